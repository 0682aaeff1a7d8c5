"""A stand-in of the Hugging Face hub on loopback: the HTTP endpoints that `huggingface_hub` calls to upload and load.

It keeps repositories as branches of files and large files by their SHA-256, checks what it is sent (hashes, sizes,
tokens) and counts requests. `hub.trouble` lets requests go wrong: a list of (pattern of "METHOD /path", what happens),
each used once: a status, "reset" (the connection breaks after half of the body), "lost" (done, and never answered) or
"slow". Requests like `hub.broken` are reset as long as it is set.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_" + "t" * 30
READ_ONLY = "hf_" + "r" * 30
SMALL = 1000  # bytes; larger files are LFS, and so are weights
PART = 20_000  # bytes of a part of a multipart upload


@dataclass
class Repository:
    private: bool
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {".gitattributes": b"lfs"}})
    large: set[bytes] = field(default_factory=set)
    commits: dict[str, str] = field(default_factory=lambda: {"main": "0" * 40})
    messages: list[str] = field(default_factory=list)


@dataclass
class Hub:
    url: str = ""
    repos: dict[str, Repository] = field(default_factory=dict)
    storage: dict[str, bytes] = field(default_factory=dict)
    parts: dict[str, dict[int, bytes]] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    trouble: list[tuple[str, int | str]] = field(default_factory=list)
    broken: str | None = None
    multipart: bool = False
    ignored: set[str] = field(default_factory=set)
    lock: threading.RLock = field(default_factory=threading.RLock)

    def sent(self, pattern: str) -> int:
        """How many requests had "METHOD /path" like this."""
        return sum(count for name, count in self.counts.items() if re.search(pattern, name))

    def files(self, repo: str, branch: str = "main") -> dict[str, bytes]:
        return {n: c for n, c in self.repos[repo].branches[branch].items() if n != ".gitattributes"}

    def next_trouble(self, request: str) -> int | str | None:
        with self.lock:
            if self.broken and re.search(self.broken, request):
                return "reset"
            for index, (pattern, what) in enumerate(self.trouble):
                if re.search(pattern, request):
                    del self.trouble[index]
                    return what
        return None


@contextmanager
def serving() -> Iterator[Hub]:
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


class _Refused(Exception):
    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        self.status, self.message, self.code = status, message, code


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else each answer waits for an acknowledgement, 40 ms

    def log_message(self, *_: Any) -> None: ...

    def _handle(self) -> None:
        split = urlsplit(self.path)
        self.where, self.query = unquote(split.path), parse_qs(split.query)
        request = f"{self.command} {self.where}"
        with self.hub.lock:
            self.hub.counts[request] += 1
        what = self.hub.next_trouble(request)
        if what == "reset":
            self.rfile.read(int(self.headers.get("Content-Length") or 0) // 2)
            return self._break()
        self.body = self._read()
        if what == "slow":
            time.sleep(0.5)
        try:
            if isinstance(what, int):
                raise _Refused(what, "trouble as ordered")
            with self.hub.lock:
                status, answer, headers = self._route()
        except _Refused as refused:
            headers = {"X-Error-Message": refused.message}
            if refused.code:
                headers["X-Error-Code"] = refused.code
            status, answer = refused.status, json.dumps({"error": refused.message}).encode()
        if what == "lost":
            return self._break()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(answer)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer)
        return None

    do_GET = do_POST = do_PUT = do_HEAD = _handle

    def _read(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _break(self) -> None:
        """Reset the connection, instead of closing it in good order."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    # --- what there is ---------------------------------------------------------------------------------------

    def _route(self) -> tuple[int, bytes, dict[str, str]]:
        for method, pattern, function in _ROUTES:
            if method in (self.command, self.command.replace("HEAD", "GET")):
                found = re.fullmatch(pattern, self.where)
                if found:
                    answer = function(self, *found.groups())
                    if isinstance(answer, tuple):
                        return answer
                    return 200, json.dumps(answer).encode(), {"Content-Type": "application/json"}
        raise _Refused(404, f"no such endpoint: {self.command} {self.where}")

    def _account(self, *, write: bool = False) -> str:
        given = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if given not in (TOKEN, READ_ONLY):
            raise _Refused(401, "Invalid username or password.")
        if write and given == READ_ONLY:
            raise _Refused(403, "You don't have the rights to write.")
        return "ada"

    def _repo(self, name: str, *, write: bool = False) -> Repository:
        repo = self.hub.repos.get(name)
        given = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if repo is None or (repo.private and given not in (TOKEN, READ_ONLY)):
            # The hub does not tell strangers what exists.
            raise _Refused(404 if given in (TOKEN, READ_ONLY) else 401, "Repository not found", "RepoNotFound")
        if write:
            self._account(write=True)
        return repo

    def _tree(self, repo: Repository, revision: str) -> tuple[str, dict[str, bytes]]:
        branch = next((b for b, oid in repo.commits.items() if revision in (b, oid)), None)
        if branch is None:
            raise _Refused(404, "Invalid rev id", "RevisionNotFound")
        return branch, repo.branches[branch]

    def whoami(self) -> Any:
        return {"type": "user", "name": self._account(), "orgs": [], "auth": {"type": "access_token"}}

    def create(self) -> Any:
        account = self._account(write=True)
        asked = json.loads(self.body)
        owner = asked.get("organization") or account
        if owner != account:
            raise _Refused(403, f"You don't have the rights to create a model under the namespace {owner!r}")
        name = f"{owner}/{asked['name']}"
        if name in self.hub.repos:
            url = json.dumps({"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"})
            return 409, url.encode(), {"Content-Type": "application/json"}
        private = asked["visibility"] == "private" if "visibility" in asked else bool(asked.get("private"))
        self.hub.repos[name] = Repository(private)
        return {"url": f"{self.hub.url}/{name}", "name": name}

    def info(self, name: str, revision: str | None = None) -> Any:
        repo = self._repo(name)
        branch, tree = self._tree(repo, revision or "main")
        siblings = [{"rfilename": path} for path in sorted(tree)]
        return {
            "_id": "1", "id": name, "modelId": name, "sha": repo.commits[branch], "private": repo.private,
            "siblings": siblings, "tags": [],
        }  # fmt: skip

    def branch(self, name: str, branch: str) -> Any:
        repo = self._repo(name, write=True)
        if branch in repo.branches:
            raise _Refused(409, "Reference already exists")
        repo.branches[branch] = dict(repo.branches["main"])
        repo.commits[branch] = hashlib.sha1(branch.encode()).hexdigest()
        return {}

    def _described(self, repo: Repository, path: str, content: bytes) -> dict[str, Any]:
        described = {"type": "file", "path": path, "size": len(content), "oid": _git_hash(content)}
        if content in repo.large:
            described["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
        return described

    def paths_info(self, name: str, revision: str) -> Any:
        repo = self._repo(name)
        _, tree = self._tree(repo, revision)
        asked = parse_qs(self.body.decode()).get("paths", [])
        return [self._described(repo, path, tree[path]) for path in asked if path in tree]

    def listing(self, name: str, revision: str) -> Any:
        repo = self._repo(name)
        _, tree = self._tree(repo, revision)
        return [self._described(repo, path, content) for path, content in sorted(tree.items())]

    def validate(self) -> Any:
        text = json.loads(self.body)["content"]
        if "base_model: none-such" in text:
            answer = {"errors": [{"message": '"base_model" with value "none-such" is not valid'}], "warnings": []}
            return 400, json.dumps(answer).encode(), {"Content-Type": "application/json"}
        return {"errors": [], "warnings": []}

    # --- upload -----------------------------------------------------------------------------------------------

    def preupload(self, name: str, revision: str) -> Any:
        repo = self._repo(name, write=True)
        _, tree = self._tree(repo, revision)
        files = []
        for each in json.loads(self.body)["files"]:
            path = each["path"]
            mode = "lfs" if each["size"] > SMALL and not path.endswith((".json", ".md", ".yaml")) else "regular"
            oid = self._oid(repo, tree[path]) if path in tree else None
            ignored = path in self.hub.ignored
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": ignored, "oid": oid})
        return {"files": files}

    def _oid(self, repo: Repository, content: bytes) -> str:
        return hashlib.sha256(content).hexdigest() if content in repo.large else _git_hash(content)

    def batch(self, name: str) -> Any:
        self._repo(name, write=True)
        objects = []
        for each in json.loads(self.body)["objects"]:
            oid, size = each["oid"], each["size"]
            answer: dict[str, Any] = {"oid": oid, "size": size}
            if oid not in self.hub.storage:
                upload: dict[str, Any] = {"href": f"{self.hub.url}/storage/{oid}?X-Amz-Signature=geheim"}
                if self.hub.multipart and size > PART:
                    numbers = range(1, -(-size // PART) + 1)
                    parts = {str(n): f"{self.hub.url}/storage/{oid}/{n}" for n in numbers}
                    upload = {
                        "href": f"{self.hub.url}/complete/{oid}",
                        "header": {"chunk_size": str(PART), **parts},
                    }
                verify = {"href": f"{self.hub.url}/{name}.git/info/lfs/objects/verify"}
                answer["actions"] = {"upload": upload, "verify": verify}
            objects.append(answer)
        transfer = "multipart" if self.hub.multipart else "basic"
        return 200, json.dumps({"transfer": transfer, "objects": objects}).encode(), {
            "Content-Type": "application/vnd.git-lfs+json"
        }

    def put(self, oid: str) -> Any:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise _Refused(400, "not what the name says")
        self.hub.storage[oid] = self.body
        return {}

    def put_part(self, oid: str, number: str) -> Any:
        self.hub.parts.setdefault(oid, {})[int(number)] = self.body
        return 200, b"", {"ETag": hashlib.md5(self.body).hexdigest()}

    def complete(self, oid: str) -> Any:
        parts = self.hub.parts.pop(oid)
        named = [(p["partNumber"], p["etag"]) for p in json.loads(self.body)["parts"]]
        if named != [(number, hashlib.md5(parts[number]).hexdigest()) for number in sorted(parts)]:
            raise _Refused(400, "these are not the parts that came")
        self.body = b"".join(parts[number] for number in sorted(parts))
        return self.put(oid)

    def verify(self, name: str) -> Any:
        self._repo(name, write=True)
        asked = json.loads(self.body)
        if len(self.hub.storage.get(asked["oid"], b"")) != asked["size"]:
            raise _Refused(404, "Object not found")
        return {}

    def commit(self, name: str, revision: str) -> Any:
        repo = self._repo(name, write=True)
        branch, tree = self._tree(repo, revision)
        new = dict(tree)
        for line in self.body.decode().splitlines():
            key, value = (item := json.loads(line))["key"], item["value"]
            if key == "header":
                repo.messages.append(value["summary"])
            elif key == "file":
                new[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                if value["oid"] not in self.hub.storage:
                    raise _Refused(400, "Your push was rejected: an LFS object is missing")
                new[value["path"]] = self.hub.storage[value["oid"]]
                repo.large.add(new[value["path"]])
            elif key == "deletedFile":
                del new[value["path"]]
        repo.branches[branch] = new
        repo.commits[branch] = hashlib.sha1(f"{branch}{len(repo.messages)}".encode()).hexdigest()
        return {"success": True, "commitOid": repo.commits[branch], "commitUrl": f"{self.hub.url}/{name}/commit/x"}

    def resolve(self, name: str, revision: str, path: str) -> Any:
        repo = self._repo(name)
        branch, tree = self._tree(repo, revision)
        headers = {"X-Repo-Commit": repo.commits[branch]}
        if path not in tree:
            missing = {**headers, "X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}
            return 404, b"{}", missing
        return 200, tree[path], {**headers, "ETag": f'"{self._oid(repo, tree[path])}"'}


def _git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


_NAME = r"([^/]+/[^/]+)"
_ROUTES = [
    ("GET", "/api/whoami-v2", _Handler.whoami),
    ("POST", "/api/repos/create", _Handler.create),
    ("POST", "/api/validate-yaml", _Handler.validate),
    ("GET", f"/api/models/{_NAME}", _Handler.info),
    ("GET", f"/api/models/{_NAME}/revision/(.+)", _Handler.info),
    ("POST", f"/api/models/{_NAME}/branch/(.+)", _Handler.branch),
    ("POST", f"/api/models/{_NAME}/paths-info/(.+)", _Handler.paths_info),
    ("GET", f"/api/models/{_NAME}/tree/([^/]+)/?", _Handler.listing),
    ("POST", f"/api/models/{_NAME}/preupload/(.+)", _Handler.preupload),
    ("POST", f"/{_NAME}\\.git/info/lfs/objects/batch", _Handler.batch),
    ("POST", f"/{_NAME}\\.git/info/lfs/objects/verify", _Handler.verify),
    ("PUT", "/storage/([0-9a-f]+)", _Handler.put),
    ("PUT", "/storage/([0-9a-f]+)/([0-9]+)", _Handler.put_part),
    ("POST", "/complete/([0-9a-f]+)", _Handler.complete),
    ("POST", f"/api/models/{_NAME}/commit/(.+)", _Handler.commit),
    ("GET", f"/{_NAME}/resolve/([^/]+)/(.+)", _Handler.resolve),
]
