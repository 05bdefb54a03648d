"""A hub on loopback: the part of the Hugging Face hub's HTTP API that uploads and downloads need."""

import base64
import contextlib
import hashlib
import http.server
import json
import re
import threading


class Hub:
  """The contents of the hub and the requests that it received.

  Attributes:
    models: name -> {"private": bool, "branches": {branch: commit}}.
    commits: commit -> {path: bytes}.
    pulls: (name, commit) of every pull request.
    refused: names for which writing is answered with 403.
  """

  def __init__(self, token: str):
    self.token, self.url = token, ""
    self.models, self.commits, self.pulls, self.refused = {}, {}, [], set()

  def commit(self, name: str, branch: str, files: dict, *, pull: bool = False) -> str:
    """Adds a commit with files to a branch, or as a pull request to it."""
    branches = self.models[name]["branches"]
    whole = self.commits.get(branches.get(branch, ""), {}) | files
    text = name + branch + repr(sorted(whole.items()))
    sha = hashlib.sha1(text.encode()).hexdigest()
    self.commits[sha] = whole
    if pull:
      self.pulls.append((name, sha))
    else:
      branches[branch] = sha
    return sha

  def make(self, name: str, private: bool = False) -> None:
    self.models.setdefault(name, {"private": private, "branches": {}})


class Handler(http.server.BaseHTTPRequestHandler):
  hub: Hub

  def log_message(self, *_):
    pass

  def answer(self, status: int, body=b"", **headers):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    self.send_response(status)
    for name, value in {"Content-Length": len(data), **headers}.items():
      self.send_header(name.replace("_", "-"), str(value))
    self.end_headers()
    if self.command != "HEAD":
      self.wfile.write(data)

  def do_GET(self):
    path = self.path.split("?")[0]
    if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
      name, sha = found[1], self.sha(found[1], found[2] or "main")
      files = [{"rfilename": file} for file in self.hub.commits.get(sha, {})]
      return self.found(sha, {"id": name, "modelId": name, "sha": sha, "siblings": files})
    if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", path):
      sha = self.sha(found[1], found[2])
      files = self.hub.commits.get(sha, {}).items()
      listed = [{"type": "file", "path": p, "size": len(x), "oid": "0" * 40} for p, x in files]
      return self.found(sha, listed)
    if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
      sha = self.sha(found[1], found[2])
      data = self.hub.commits.get(sha, {}).get(found[3])
      if data is None:
        return self.answer(404, X_Error_Code="EntryNotFound")
      etag = f'"{hashlib.sha1(data).hexdigest()}"'
      return self.answer(200, data, ETag=etag, X_Repo_Commit=sha)
    return self.answer(404)

  do_HEAD = do_GET

  def sha(self, name: str, revision: str) -> str:
    branches = self.hub.models.get(name, {"branches": {}})["branches"]
    return branches.get(revision, revision)

  def found(self, sha: str, body):
    if sha in self.hub.commits:
      return self.answer(200, body)
    return self.answer(404, {"error": "no such revision"}, X_Error_Code="RevisionNotFound")

  def do_POST(self):
    data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
    if self.headers.get("Authorization") != f"Bearer {self.hub.token}":
      return self.answer(401, {"error": "no token"})
    path, _, query = self.path.partition("?")
    if path == "/api/validate-yaml":
      return self.answer(200, {"errors": [], "warnings": []})
    if path == "/api/repos/create":
      asked = json.loads(data)
      name = f"{asked['organization']}/{asked['name']}"
      if name in self.hub.refused:
        return self.answer(403, {"error": "not yours"})
      private = asked.get("private") or asked.get("visibility") == "private"
      self.hub.make(name, bool(private))
      return self.answer(200, {"url": f"{self.hub.url}/{name}"})
    name, what, branch = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(\w+)/(.+)", path).groups()
    if name not in self.hub.models:
      return self.answer(404, {"error": "no such model"}, X_Error_Code="RepoNotFound")
    if what == "preupload":
      files = [
        {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
        for file in json.loads(data)["files"]
      ]
      return self.answer(200, {"files": files})
    if what == "branch":
      branches = self.hub.models[name]["branches"]
      branches.setdefault(branch, branches.get("main", ""))
      return self.answer(200, {})
    rows = [row["value"] for row in map(json.loads, data.splitlines()) if row["key"] == "file"]
    files = {row["path"]: base64.b64decode(row["content"]) for row in rows}
    pull = "create_pr=1" in query
    sha = self.hub.commit(name, branch, files, pull=pull)
    made = {"commitUrl": f"{self.hub.url}/{name}/commit/{sha}", "commitOid": sha}
    made["pullRequestUrl"] = f"{self.hub.url}/{name}/discussions/1" if pull else None
    return self.answer(200, made)


@contextlib.contextmanager
def serving(token: str):
  """A Hub that answers at `hub.url` while the block runs."""
  hub = Hub(token)
  handler = type("Bound", (Handler,), {"hub": hub})
  server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
  hub.url = f"http://127.0.0.1:{server.server_address[1]}"
  thread = threading.Thread(target=server.serve_forever, daemon=True)
  thread.start()
  try:
    yield hub
  finally:
    server.shutdown()
    thread.join()
    server.server_close()
