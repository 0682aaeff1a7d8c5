"""A stand-in of the Hugging Face hub on loopback, as much of it as `datasets.load_dataset` asks: what a repository of
data files holds, and the files.

A process finds it by `HF_ENDPOINT`, which `huggingface_hub` reads when it is imported.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "5" * 40


@contextmanager
def serving(repositories: Mapping[str, Mapping[str, bytes]]) -> Iterator[tuple[str, list[str]]]:
    """Address of the hub, and the list that each request is noted in.

    Args:
        repositories: "owner/name" -> path of a file -> its content.
    """
    asked: list[str] = []
    handler = type("Handler", (_Handler,), {"repositories": repositories, "asked": asked})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    repositories: Mapping[str, Mapping[str, bytes]]
    asked: list[str]
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_: Any) -> None: ...

    def _handle(self) -> None:
        where = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.asked.append(f"{self.command} {where}")
        status, answer, headers = self._answer(where, body)
        self.send_response(status)
        for name, value in {"Content-Length": str(len(answer)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer)

    do_GET = do_POST = do_HEAD = _handle

    def _answer(self, where: str, body: bytes) -> tuple[int, bytes, dict[str, str]]:
        for name, files in self.repositories.items():
            api, resolve = f"/api/datasets/{name}", f"/datasets/{name}/resolve/"
            if where.startswith(resolve):
                path = where[len(resolve) :].partition("/")[2]
                if path in files:
                    oid = hashlib.sha1(files[path]).hexdigest()
                    return 200, files[path], {"ETag": f'"{oid}"', "X-Repo-Commit": COMMIT}
            elif where == api or where == f"{api}/revision/main" or where == f"{api}/revision/{COMMIT}":
                siblings = [{"rfilename": path} for path in sorted(files)]
                told = {"_id": "1", "id": name, "sha": COMMIT, "private": False, "siblings": siblings, "tags": []}
                return _json(told)
            elif where.startswith(f"{api}/tree/"):
                folder = where[len(api) + 6 :].partition("/")[2]
                start = f"{folder}/" if folder else ""
                inside = sorted(path for path in files if path.startswith(start))
                if folder and not inside:
                    break
                deeper = "recursive=true" in self.path.lower()
                held = [path for path in inside if deeper or "/" not in path[len(start) :]]
                folders = {start + path[len(start) :].partition("/")[0] for path in inside if path not in held}
                listed = [{"type": "directory", "path": path, "oid": "6" * 40, "size": 0} for path in sorted(folders)]
                return _json(listed + [_described(path, files[path]) for path in held])
            elif where.startswith(f"{api}/paths-info/"):
                paths = parse_qs(body.decode()).get("paths", [])
                return _json([_described(path, files[path]) for path in paths if path in files])
        missing = json.dumps({"error": f"not there: {where}"}).encode()
        return 404, missing, {"X-Error-Code": "EntryNotFound" if "/resolve/" in where else "RepoNotFound"}


def _json(value: Any) -> tuple[int, bytes, dict[str, str]]:
    return 200, json.dumps(value).encode(), {"Content-Type": "application/json"}


def _described(path: str, content: bytes) -> dict[str, Any]:
    return {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
