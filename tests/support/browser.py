"""Headless Chromium, controlled by the DevTools protocol over two pipes, without a library or a
port.

`find()` returns the path of the program, or None. A `Page` opens one page and records its requests
and errors.
"""

import contextlib
import json
import os
import select
import shutil
import subprocess
import time

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
KEYS = {"ArrowLeft": 37, "ArrowRight": 39, "Home": 36, "End": 35, "Tab": 9, "Enter": 13}
START = 60  # seconds within which the browser answers or a page is loaded


def find() -> str | None:
  return next((path for name in NAMES if (path := shutil.which(name))), None)


class Page:
  """One page.

  Attributes:
    errors: errors on the console, and exceptions of scripts.
    requests: every requested address.
  """

  def __init__(self, program: str, folder):
    to_browser, self._out = os.pipe()
    self._in, from_browser = os.pipe()
    flags = "--headless --no-sandbox --disable-gpu --no-first-run --remote-debugging-pipe"
    command = f'exec "$0" {flags} --user-data-dir="$1" 3<&{to_browser} 4>&{from_browser}'
    self._process = subprocess.Popen(
      ["bash", "-c", command, program, str(folder)],
      pass_fds=(to_browser, from_browser),
      stdout=subprocess.DEVNULL,
      stderr=subprocess.DEVNULL,
    )
    os.close(to_browser)
    os.close(from_browser)
    self._rest, self._number, self._session = b"", 0, None
    self.errors: list[str] = []
    self.requests: list[str] = []
    target = self.send("Target.createTarget", url="about:blank")["targetId"]
    self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
    for domain in ("Page", "Runtime", "Network", "Log"):
      self.send(f"{domain}.enable")

  def close(self) -> None:
    with contextlib.suppress(OSError, AssertionError):
      self.send("Browser.close")
    try:
      self._process.wait(timeout=START)
    except subprocess.TimeoutExpired:
      self._process.kill()
    os.close(self._out)
    os.close(self._in)

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self.close()

  def _next(self) -> dict:
    """The next message of the browser. Events are recorded."""
    while b"\0" not in self._rest:
      ready, _, _ = select.select([self._in], [], [], START)
      assert ready, f"the browser has not answered for {START} s"
      part = os.read(self._in, 1 << 20)
      if not part:
        raise OSError("the browser ended")
      self._rest += part
    text, _, self._rest = self._rest.partition(b"\0")
    message = json.loads(text)
    method, found = message.get("method"), message.get("params", {})
    if method == "Network.requestWillBeSent":
      self.requests.append(found["request"]["url"])
    elif method == "Runtime.exceptionThrown":
      self.errors.append(str(found["exceptionDetails"]))
    elif method == "Runtime.consoleAPICalled" and found["type"] == "error":
      self.errors.append(str(found["args"]))
    elif method == "Log.entryAdded" and found["entry"]["level"] == "error":
      self.errors.append(str(found["entry"]))
    return message

  def send(self, method: str, **params) -> dict:
    """Calls a method of the protocol and returns its result."""
    self._number += 1
    call = {"id": self._number, "method": method, "params": params}
    if self._session:
      call["sessionId"] = self._session
    os.write(self._out, json.dumps(call).encode() + b"\0")
    while True:
      message = self._next()
      if message.get("id") == self._number:
        assert "error" not in message, f"{method}: {message['error']}"
        return message["result"]

  def open(self, address: str) -> None:
    """Opens a page and waits until it is loaded."""
    self._go("about:blank")  # otherwise another #part would not reload the page
    self.errors.clear()
    self.requests.clear()
    self._go(address)

  def _go(self, address: str) -> None:
    self.send("Page.navigate", url=address)
    end = time.monotonic() + START
    state = "document.readyState + ' ' + location.href"
    while self.run(state) != f"complete {address}":
      assert time.monotonic() < end, f"{address} was not loaded within {START} s"
      time.sleep(0.02)

  def run(self, script: str):
    """The value of an expression of JavaScript; a promise is awaited."""
    result = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
    assert "exceptionDetails" not in result, result["exceptionDetails"]
    return result["result"].get("value")

  def size(self, width: int, height: int, *, phone: bool = False) -> None:
    self.send(
      "Emulation.setDeviceMetricsOverride",
      width=width,
      height=height,
      deviceScaleFactor=1,
      mobile=phone,
    )

  def scheme(self, name: str) -> None:
    """prefers-color-scheme: "light" or "dark"."""
    feature = {"name": "prefers-color-scheme", "value": name}
    self.send("Emulation.setEmulatedMedia", features=[feature])

  def press(self, key: str) -> None:
    """Sends a key to the element with the focus, as a keyboard would."""
    code = {"key": key, "code": key, "windowsVirtualKeyCode": KEYS[key]}
    text = {"text": "\r"} if key == "Enter" else {}
    self.send("Input.dispatchKeyEvent", type="keyDown", **code, **text)
    self.send("Input.dispatchKeyEvent", type="keyUp", **code)
