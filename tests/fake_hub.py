"""A little Hugging Face hub on this machine, for the client's real requests.

It knows what an upload needs (create, preupload, large files, commit) and what reading a data set
needs, keeps files in memory, and can be told to fail.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

SHA = "0123456789abcdef0123456789abcdef01234567"


class FakeHub:
    """State of the hub; `fail` maps a part of a path to the status that it is answered with."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, bytes]] = {}
        self.large: dict[str, bytes] = {}
        self.private: set[str] = set()
        self.commits: list[str] = []
        self.asked: list[str] = []
        self.fail: dict[str, int] = {}
        self.slow_s = 0.0  # before a large file is taken
        self.url = ""

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, Any, dict[str, str]]:
        """Status, JSON or bytes, and headers."""
        self.asked.append(f"{method} {path}")
        for part, status in self.fail.items():
            if part in path:
                told = f"told to answer {status}"
                return status, {"error": told}, {"X-Error-Message": told}
        if path == "/api/repos/create":
            wanted = json.loads(body)
            name = "/".join(filter(None, (wanted.get("organization"), wanted["name"])))
            if name in self.repos:
                url = f"{self.url}/{name}"
                return 409, {"error": "You already created this model repo", "url": url}, {}
            self.repos[name] = {}
            if wanted.get("private") or wanted.get("visibility") == "private":
                self.private.add(name)
            return 200, {"url": f"{self.url}/{name}", "name": name, "id": name}, {}
        if "/preupload/" in path:
            files = json.loads(body)["files"]
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for file in files
            ]
            return 200, {"files": modes}, {}
        if path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**o, "actions": {"upload": {"href": f"{self.url}/large/{o['oid']}"}}}
                for o in json.loads(body)["objects"]
            ]
            return 200, {"transfer": "basic", "objects": objects}, {}
        if method == "PUT" and path.startswith("/large/"):
            time.sleep(self.slow_s)
            assert hashlib.sha256(body).hexdigest() == path.removeprefix("/large/")
            self.large[path.removeprefix("/large/")] = body
            return 200, {}, {}
        if "/commit/" in path:
            return self._commit(path, body)
        return self._read(path)

    def _commit(self, path: str, body: bytes) -> tuple[int, Any, dict[str, str]]:
        name = path.removeprefix("/api/models/").partition("/commit/")[0]
        fresh = {}
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                fresh[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                fresh[value["path"]] = self.large[value["oid"]]
        self.repos[name].update(fresh)
        self.commits.append(name)
        answer = {"commitUrl": f"{self.url}/{name}/commit/{SHA}", "commitOid": SHA}
        return 200, {**answer, "success": True}, {}

    def _read(self, path: str) -> tuple[int, Any, dict[str, str]]:
        kind, _, rest = path.removeprefix("/api").strip("/").partition("/")
        parts = rest.split("/")
        name = "/".join(parts[:2])
        if kind == "datasets" and "resolve" in parts and name in self.repos:
            file = "/".join(parts[4:])
            content = self.repos[name].get(file)
            if content is None:
                return 404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"}
            digest = hashlib.sha256(content).hexdigest()
            headers = {"X-Repo-Commit": SHA, "ETag": f'"{digest}"'}
            return 200, content, headers
        if kind == "datasets" and name in self.repos:
            files = self.repos[name]
            if "paths-info" in parts or "tree" in parts:
                return 200, [_entry(n, c) for n, c in files.items()], {}
            siblings = [{"rfilename": n} for n in files]
            return 200, {"id": name, "sha": SHA, "siblings": siblings, "tags": []}, {}
        return 404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"}


def _entry(name: str, content: bytes) -> dict[str, Any]:
    oid = hashlib.sha1(content).hexdigest()
    return {"type": "file", "path": name, "size": len(content), "oid": oid}


@contextmanager
def running_hub() -> Iterator[FakeHub]:
    """A hub on a free port while the block runs."""
    hub = FakeHub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _do(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            path = unquote(urlsplit(self.path).path)
            status, value, headers = hub.answer(self.command, path, body)
            data = value if isinstance(value, bytes) else json.dumps(value).encode()
            if (wanted := self.headers.get("Range")) and isinstance(value, bytes):
                first, _, last = wanted.removeprefix("bytes=").partition("-")
                data, status = data[int(first) : int(last or len(data)) + 1], 206
            self.send_response(status)
            for key, text in headers.items():
                self.send_header(key, text)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        do_GET = do_HEAD = do_POST = do_PUT = _do

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
