"""A chat endpoint on loopback that can misbehave on request, and counts its requests.

Run as a program it prints its address and serves until its input ends, for tests of killed runs.
"""

import contextlib
import http.server
import json
import os
import socket
import struct
import sys
import threading
import time

os.environ["no_proxy"] = "127.0.0.1"  # for this process and those it starts


def completion(text, *, logprobs=None, usage=(100, 5), choices=None):
  """A chat completion as OpenAI's API returns it."""
  choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
  if logprobs is not None:
    top = [{"token": token, "logprob": value} for token, value in logprobs.items()]
    choice["logprobs"] = {"content": [{**top[0], "top_logprobs": top}]}
  reply = {"model": "judge-1", "choices": choices or [choice]}
  if usage:
    reply["usage"] = {"prompt_tokens": usage[0], "completion_tokens": usage[1]}
  return reply


def verdict(body):
  """A fair judge of `alpaca_eval`: the output with more letters x wins, by its label."""
  text = body["messages"][-1]["content"]
  first = text.split("<output_m>\n")[1].split("\n</output_m>")[0]
  second = text.split("<output_M>\n")[1].split("\n</output_M>")[0]
  return "m" if first.count("x") >= second.count("x") else "M"


class Server:
  """Serves in threads of this process.

  Args:
    behave: (body, number of earlier requests with this body) -> a completion, or one of ("status",
      code, headers, text), ("cut",), ("raw", bytes), ("sleep", seconds, completion).
  """

  def __init__(self, behave):
    self.behave = behave
    self.asked = {}  # body as text -> number of requests
    self.answered = {}  # body as text -> number of good answers
    self.times = []  # of each request, monotonic
    self.headers = []
    self.most = 0  # maximum of simultaneous requests
    self._now = 0
    self._lock = threading.Lock()
    server = self

    class Handler(http.server.BaseHTTPRequestHandler):
      def do_POST(self):
        with contextlib.suppress(ConnectionError):
          server.handle(self)

      def log_message(self, *args):
        pass

    self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    self.http.daemon_threads = True
    self.url = f"http://127.0.0.1:{self.http.server_address[1]}/v1"
    threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self.http.shutdown()
    self.http.server_close()

  def handle(self, request):
    body = json.loads(request.rfile.read(int(request.headers["Content-Length"])))
    name = json.dumps(body, sort_keys=True)
    with self._lock:
      before = self.asked.get(name, 0)
      self.asked[name] = before + 1
      self.times.append(time.monotonic())
      self.headers.append(dict(request.headers))
      self._now += 1
      self.most = max(self.most, self._now)
    try:
      self.reply(request, name, self.behave(body, before))
    finally:
      with self._lock:
        self._now -= 1

  def reply(self, request, name, found):
    if isinstance(found, tuple) and found[0] == "sleep":
      time.sleep(found[1])
      found = found[2]
    if isinstance(found, tuple) and found[0] == "cut":
      # the connection is reset in the middle of the answer
      request.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
      request.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\n{")
      request.wfile.flush()
      request.connection.close()
      return
    status, headers, data = 200, {}, None
    if isinstance(found, tuple) and found[0] == "status":
      _, status, headers, text = found
      data = text.encode()
    elif isinstance(found, tuple):
      data = found[1]
    else:
      data = json.dumps(found).encode()
      with self._lock:
        self.answered[name] = self.answered.get(name, 0) + 1
    request.send_response(status)
    for header, value in headers.items():
      request.send_header(header, value)
    request.send_header("Content-Length", str(len(data)))
    request.end_headers()
    request.wfile.write(data)


def main():
  """A fair judge that takes a moment for each answer and reports how often it answered a repeated
  request.
  """
  slow = float(sys.argv[1])

  def behave(body, before):
    del before
    return ("sleep", slow, completion(verdict(body)))

  with Server(behave) as server:
    print(server.url, flush=True)
    for _ in sys.stdin:
      print(json.dumps(sorted(server.answered.values())), flush=True)


if __name__ == "__main__":
  main()
