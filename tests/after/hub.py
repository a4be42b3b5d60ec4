"""A stand-in for the hub, on this machine: as much of its HTTP interface as the client's push uses.

What arrives is kept: every request with its headers, and the files of every commit.
"""

import base64
import json
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN = "hf_stand_in_for_a_token"


@dataclass
class Request:
    """One request as it came."""

    method: str
    path: str
    headers: dict
    body: bytes


@dataclass
class Hub:
    """State: `visibility` and `files` by repository, large objects by sha256, all requests.

    `refuse`: {beginning of a path: HTTP status} for requests that are to fail.
    """

    visibility: dict = field(default_factory=dict)
    files: dict = field(default_factory=dict)
    objects: dict = field(default_factory=dict)
    requests: list = field(default_factory=list)
    refuse: dict = field(default_factory=dict)
    url: str = ""

    def answer(self, request):
        """(status, JSON answer) to a request."""
        self.requests.append(request)
        path = request.path.split("?")[0]
        for start, status in self.refuse.items():
            if path.startswith(start):
                return status, {"error": "refused by the stand-in"}
        if path.startswith("/lfs/"):  # the store behind the hub: no token goes there
            self.objects[path.removeprefix("/lfs/")] = request.body
            return 200, {}
        if request.headers.get("authorization") != f"Bearer {TOKEN}":
            return 401, {"error": "Invalid credentials"}
        sent = json.loads(request.body) if request.body and "/commit/" not in path else {}
        if path == "/api/repos/create":
            return self.create(f"{sent['organization']}/{sent['name']}", sent)
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path.endswith("/info/lfs/objects/batch"):
            return 200, {"transfer": "basic", "objects": [self.upload(o) for o in sent["objects"]]}
        repo = "/".join(path.removeprefix("/api/models/").split("/")[:2])
        if repo not in self.visibility:
            return 404, {"error": "Repository not found"}
        if "/preupload/" in path:
            return 200, {"files": [self.upload_mode(file) for file in sent["files"]]}
        if "/commit/" in path:
            self.commit(repo, [json.loads(line) for line in request.body.splitlines()])
            return 200, {"commitUrl": f"{self.url}/{repo}/commit/1", "commitOid": "1" * 40}
        private = self.visibility[repo] == "private"
        return 200, {"id": repo, "sha": "0" * 40, "private": private, "siblings": []}

    def create(self, repo, sent):
        """A new repository, or 409 for one that is there."""
        url = {"url": f"{self.url}/{repo}"}
        if repo in self.visibility:
            return 409, url
        self.visibility[repo], self.files[repo] = sent["visibility"], {}
        return 200, url

    def upload(self, wanted):
        """Where the client shall put a large file."""
        href = f"{self.url}/lfs/{wanted['oid']}"
        return {**wanted, "actions": {"upload": {"href": href, "header": {}}}}

    def upload_mode(self, file):
        """Large files go beside the commit."""
        mode = "lfs" if file["path"].endswith(".safetensors") else "regular"
        return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}

    def commit(self, repo, lines):
        """Puts the files of one commit in place."""
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                self.files[repo][value["path"]] = base64.b64decode(value["content"])
            if line["key"] == "lfsFile":
                self.files[repo][value["path"]] = self.objects[value["oid"]]


@contextmanager
def running_hub():
    """A hub that listens on a free port of this machine."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def handle_any(self):
            length = int(self.headers.get("Content-Length") or 0)
            body = self.rfile.read(length) if length else self.chunked()
            headers = {name.lower(): value for name, value in self.headers.items()}
            status, answer = hub.answer(Request(self.command, self.path, headers, body))
            content = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def chunked(self):
            if self.headers.get("Transfer-Encoding") != "chunked":
                return b""
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        do_GET = do_POST = do_PUT = handle_any  # noqa: N815

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
