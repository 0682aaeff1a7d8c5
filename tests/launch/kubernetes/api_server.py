"""As much of a Kubernetes API server as `kubectl apply --server-side` needs: what there is, and PATCH.

What it is sent, it validates by the published OpenAPI schema, unknown fields included, which is what a real one does
for fieldValidation=Strict; then it keeps it.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import yaml

from tests.launch.kubernetes.schema import VERSIONS, Invalid, validate

KINDS = {
    "v1": {"configmaps": "ConfigMap", "persistentvolumeclaims": "PersistentVolumeClaim", "services": "Service"},
    "batch/v1": {"jobs": "Job"},
}


def root(version: str) -> str:
    return f"/api/{version}" if version == "v1" else f"/apis/{version}"


class Cluster:
    """Attributes: objects: by `namespace/plural/name`. requests: query strings of what was patched."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.objects: dict[str, dict[str, Any]] = {}
        self.queries: list[str] = []

    def kubeconfig(self, path: Path, namespace: str) -> str:
        """A kubeconfig for this cluster; gives its path."""
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "c", "cluster": {"server": f"http://127.0.0.1:{self.port}"}}],
            "users": [{"name": "u", "user": {}}],
            "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u", "namespace": namespace}}],
            "current-context": "x",
        }
        path.write_text(yaml.safe_dump(config))
        return str(path)


@contextmanager
def cluster() -> Iterator[Cluster]:
    """A cluster on a port of this machine, while entered."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.cluster = Cluster(server.server_port)  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server.cluster  # type: ignore[attr-defined]
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        known = _discovery().get(path) or self.server.cluster.objects.get(_key(path))  # type: ignore[attr-defined]
        self._answer(200, known) if known else self._fail(404, "NotFound", "not found")

    def do_PATCH(self) -> None:
        path, _, query = self.path.partition("?")
        body = yaml.safe_load(self.rfile.read(int(self.headers["Content-Length"])))
        found: Cluster = self.server.cluster  # type: ignore[attr-defined]
        found.queries.append(query)
        try:
            validate(body, VERSIONS[:1])
        except Invalid as error:
            self._fail(400, "BadRequest", str(error))
            return
        found.objects[_key(path)] = body
        self._answer(201, body)

    def _fail(self, code: int, reason: str, message: str) -> None:
        status = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": reason, "message": message}
        self._answer(code, status | {"code": code})

    def _answer(self, code: int, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


def _key(path: str) -> str:
    """`namespace/plural/name` of an object's path."""
    return "/".join(path.split("/namespaces/")[-1].split("/"))


def _discovery() -> dict[str, dict[str, Any]]:
    version = {"groupVersion": "batch/v1", "version": "v1"}
    verbs = ["get", "patch"]
    found: dict[str, dict[str, Any]] = {
        "/version": {"major": "1", "minor": "32", "gitVersion": "v1.32.0"},
        "/api": {"kind": "APIVersions", "versions": ["v1"]},
        "/apis": {
            "kind": "APIGroupList",
            "apiVersion": "v1",
            "groups": [{"name": "batch", "versions": [version], "preferredVersion": version}],
        },
        "/openapi/v3": {
            "paths": {root(each)[1:]: {"serverRelativeURL": f"/openapi/v3{root(each)}"} for each in KINDS}
        },
    }
    for version_name, kinds in KINDS.items():
        found[root(version_name)] = {
            "kind": "APIResourceList",
            "apiVersion": "v1",
            "groupVersion": version_name,
            "resources": [
                {"name": plural, "singularName": kind.lower(), "kind": kind, "namespaced": True, "verbs": verbs}
                for plural, kind in kinds.items()
            ],
        }
        found[f"/openapi/v3{root(version_name)}"] = {
            "openapi": "3.0.0",
            "info": {"title": "stand-in", "version": "1"},
            "paths": {
                f"{root(version_name)}/namespaces/{{namespace}}/{plural}/{{name}}": {
                    "patch": {
                        "x-kubernetes-group-version-kind": {
                            "group": version_name.rpartition("/")[0],
                            "version": version_name.rpartition("/")[2],
                            "kind": kind,
                        },
                        "parameters": [{"name": "fieldValidation", "in": "query", "schema": {"type": "string"}}],
                        "responses": {"200": {"description": "OK"}},
                    }
                }
                for plural, kind in kinds.items()
            },
        }
    return found
