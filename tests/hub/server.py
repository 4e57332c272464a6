"""A hub of its own on 127.0.0.1, which speaks as much of the HTTP API as the real client uses.

Creating a repository and a branch, its info with sizes, pre-upload, LFS batch and upload, commit,
and files with etag, commit and ranges. It keeps everything in memory and can be told to fail.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_right"
_RESOLVE = re.compile(r"/datasets/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
_API = re.compile(r"/api/datasets/([^/]+/[^/]+)(?:/(revision|preupload|commit|branch)/(.+))?")

#: Of a request, what goes wrong: a status, "half" of the body and then the line cut, or None.
Fault = Callable[[str, str], "int | str | None"]


class Repo:
    """Commits of files, and branches that point to them."""

    def __init__(self, private: bool) -> None:
        self.private = private
        self.commits: dict[str, dict[str, bytes]] = {}
        self.branches = {"main": self.commit({".gitattributes": b"*.bin filter=lfs\n"})}

    def commit(self, files: dict[str, bytes]) -> str:
        text = repr([(len(self.commits), name, hash(data)) for name, data in files.items()])
        sha = hashlib.sha1(text.encode()).hexdigest()
        self.commits[sha] = dict(files)
        return sha

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return self.commits[self.branches.get(revision, revision)]

    def change(self, files: dict[str, bytes | None], branch: str = "main") -> None:
        """A commit by somebody else; None removes."""
        found = {**self.files(branch), **files}
        self.branches[branch] = self.commit({n: d for n, d in found.items() if d is not None})


class Hub(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.log: list[tuple[str, str, str]] = []  # method, path, range
        self.fault: Fault = lambda method, path: None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def asked(self, method: str, part: str) -> list[str]:
        return [path for m, path, _ in self.log if m == method and part in path]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that hang up are no news."""


@contextmanager
def running() -> Iterator[Hub]:
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = 1 << 16  # head and body in one packet
    server: Hub

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer(self._get)

    def do_HEAD(self) -> None:
        self._answer(self._get)

    def do_POST(self) -> None:
        self._answer(self._post)

    def do_PUT(self) -> None:
        self._answer(self._put)

    def _answer(self, act: Callable[[str], None]) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.log.append((self.command, path, self.headers.get("Range") or ""))
        self.body = self._read()
        fault = self.server.fault(self.command, path)
        self.half = fault == "half"
        if isinstance(fault, int):
            codes = {401: "RepoNotFound", 404: "RepoNotFound"}
            self._refuse(fault, codes.get(fault, ""))
        elif self.headers.get("Authorization", f"Bearer {TOKEN}") != f"Bearer {TOKEN}":
            self._refuse(401, "", "Invalid credentials in Authorization header")
        else:
            act(path)

    def _read(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _repo(self, name: str) -> Repo | None:
        repo = self.server.repos.get(name)
        if repo is None or (repo.private and "Authorization" not in self.headers):
            self._refuse(401 if "Authorization" not in self.headers else 404, "RepoNotFound")
            return None
        return repo

    # What is asked for

    def _get(self, path: str) -> None:
        if found := _RESOLVE.fullmatch(path):
            self._resolve(*found.groups())
        elif found := _API.fullmatch(path):
            name, _, revision = found.groups()
            repo = self._repo(name)
            if repo is None:
                return
            sha = repo.branches.get(revision or "main", revision)
            if sha not in repo.commits:
                self._refuse(404, "RevisionNotFound")
                return
            siblings = [
                {
                    "rfilename": file,
                    "size": len(data),
                    "blobId": hashlib.sha1(data).hexdigest(),
                    **({"lfs": _lfs(data)} if file.endswith(".bin") else {}),
                }
                for file, data in repo.commits[sha].items()
            ]
            facts = {"id": name, "sha": sha, "private": repo.private, "siblings": siblings}
            self._json({**facts, "tags": [], "downloads": 0, "likes": 0})
        elif path.startswith("/lfs/"):
            self._bytes(self.server.blobs[path.removeprefix("/lfs/")], {})
        else:
            self._refuse(404, "")

    def _resolve(self, name: str, revision: str, file: str) -> None:
        repo = self._repo(name)
        if repo is None:
            return
        sha = repo.branches.get(revision, revision)
        if sha not in repo.commits:
            self._refuse(404, "RevisionNotFound")
        elif file not in repo.commits[sha]:
            self._refuse(404, "EntryNotFound", sha=sha)
        else:
            data = repo.commits[sha][file]
            etag = hashlib.sha256(data).hexdigest()
            self._bytes(data, {"ETag": f'"{etag}"', "X-Repo-Commit": sha})

    def _post(self, path: str) -> None:
        hub = self.server
        if path == "/api/repos/create":
            asked = json.loads(self.body)
            name = f"{asked['organization']}/{asked['name']}"
            private = asked.get("private", asked.get("visibility") == "private")
            hub.repos.setdefault(name, Repo(bool(private)))
            self._json({"url": f"{hub.url}/datasets/{name}", "name": name})
        elif path == "/api/validate-yaml":
            import yaml

            front = json.loads(self.body)["content"].split("---\n")[1]
            assert isinstance(yaml.safe_load(front), dict)
            self._json({"warnings": [], "errors": []})
        elif path.endswith(".git/info/lfs/objects/batch"):
            objects = json.loads(self.body)["objects"]
            found = []
            for one in objects:
                action = {"upload": {"href": f"{hub.url}/lfs/{one['oid']}", "header": {}}}
                there = one["oid"] in hub.blobs
                found.append({**one, **({} if there else {"actions": action})})
            self._json({"transfer": "basic", "objects": found})
        elif found := _API.fullmatch(path):
            self._post_repo(*found.groups())
        else:
            self._refuse(404, "")

    def _post_repo(self, name: str, action: str, revision: str) -> None:
        repo = self._repo(name)
        if repo is None:
            return
        if action == "branch":
            repo.branches.setdefault(revision, repo.branches["main"])
            self._json({})
        elif action == "preupload":
            files = json.loads(self.body)["files"]
            modes = [
                {
                    "path": one["path"],
                    "uploadMode": "lfs" if one["path"].endswith((".bin", ".faiss")) else "regular",
                    "shouldIgnore": False,
                }
                for one in files
            ]
            self._json({"files": modes})
        else:
            self._commit(repo, name, revision)

    def _commit(self, repo: Repo, name: str, branch: str) -> None:
        lines = [json.loads(line) for line in self.body.splitlines()]
        changes: dict[str, bytes | None] = {}
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                if value.get("parentCommit") not in (None, repo.branches[branch]):
                    self._refuse(412, "", "A commit has happened since.")
                    return
            elif line["key"] == "file":
                changes[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                changes[value["path"]] = self.server.blobs[value["oid"]]
            else:
                assert line["key"] == "deletedFile", line
                changes[value["path"]] = None
        repo.change(changes, branch)
        sha = repo.branches[branch]
        self._json(
            {"commitUrl": f"{self.server.url}/datasets/{name}/commit/{sha}", "commitOid": sha}
        )

    def _put(self, path: str) -> None:
        oid = path.removeprefix("/lfs/")
        if hashlib.sha256(self.body).hexdigest() != oid:
            self._refuse(400, "", "not these bytes")
            return
        self.server.blobs[oid] = self.body
        self._json({})

    # Answers

    def _json(self, content: Any) -> None:
        self._bytes(json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _bytes(self, data: bytes, headers: dict[str, str]) -> None:
        start = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        self.send_response(206 if start else 200)
        whole = len(data)
        if start:
            data = data[int(start[1]) :]
            headers = {**headers, "Content-Range": f"bytes {start[1]}-{whole - 1}/{whole}"}
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: len(data) // 2] if self.half else data)
            self.close_connection = self.half

    def _refuse(self, status: int, code: str, message: str = "", sha: str = "") -> None:
        self.send_response(status)
        found = {"X-Error-Code": code, "X-Error-Message": message, "X-Repo-Commit": sha}
        for name, value in {**found, "Content-Length": "0"}.items():
            if value:
                self.send_header(name, value)
        self.end_headers()


def _lfs(data: bytes) -> dict[str, Any]:
    return {"size": len(data), "sha256": hashlib.sha256(data).hexdigest(), "pointerSize": 130}
