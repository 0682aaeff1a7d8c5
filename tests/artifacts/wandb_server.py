"""A stand-in of Weights & Biases' server on loopback: what its real client asks to find, fetch and log artifacts.

Artifacts are kept as versions of files. `server.unknown` lists the GraphQL operations that had no answer.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

KEY = "0123456789abcdef0123456789abcdef01234567"
TIME = "2026-01-01T00:00:00Z"


@dataclass
class Version:
    """Attributes:
    number: 7 of `v7`. files: what it holds.
    """

    id: str
    entity: str
    project: str
    name: str
    kind: str
    number: int
    files: dict[str, bytes]
    aliases: list[str]
    metadata: dict[str, Any] = field(default_factory=dict)
    state: str = "COMMITTED"
    digest: str = ""

    def manifest(self) -> dict[str, Any]:
        contents = {
            name: {"digest": md5(body), "size": len(body), "birthArtifactID": self.id}
            for name, body in self.files.items()
        }
        return {
            "version": 1,
            "storagePolicy": "wandb-storage-policy-v1",
            "storagePolicyConfig": {"storageLayout": "V2"},
            "contents": contents,
        }


@dataclass
class Server:
    url: str = ""
    versions: list[Version] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    unknown: list[str] = field(default_factory=list)
    used: list[str] = field(default_factory=list)
    damaged: bool = False
    uploads_fail: bool = False
    blobs: dict[str, bytes] = field(default_factory=dict)
    manifests: dict[str, str] = field(default_factory=dict)

    def add(
        self, name: str, files: dict[str, bytes], *aliases: str, kind: str = "model", entity: str = "team",
        project: str = "lab",
    ) -> Version:  # fmt: skip
        before = [v for v in self.versions if (v.entity, v.project, v.name) == (entity, project, name)]
        for each in before:
            each.aliases = [a for a in each.aliases if a not in ("latest", *aliases)]
        made = Version(
            f"artifact-{len(self.versions)}", entity, project, name, kind, len(before), dict(files),
            ["latest", *aliases],
        )  # fmt: skip
        made.digest = md5(repr(sorted(files.items())).encode())
        self.versions.append(made)
        return made

    def find(self, entity: str, project: str, name: str) -> Version | None:
        name, _, alias = name.partition(":")
        for each in self.versions:
            at = (each.entity, each.project, each.name)
            if at == (entity, project, name) and alias in (f"v{each.number}", *each.aliases):
                return each
        return None

    def of(self, id: str) -> Version:
        return next(each for each in self.versions if each.id == id)


def md5(body: bytes) -> str:
    return base64.b64encode(hashlib.md5(body, usedforsecurity=False).digest()).decode()


def _project(version: Version) -> dict[str, Any]:
    return {
        "id": "UHJvamVjdDox", "internalId": "1", "name": version.project, "entity": {"name": version.entity},
    }  # fmt: skip


def _artifact(version: Version) -> dict[str, Any]:
    collection = {"__typename": "ArtifactSequence", "name": version.name, "project": _project(version)}
    return {
        "__typename": "Artifact",
        "id": version.id,
        "artifactSequence": collection,
        "versionIndex": version.number,
        "artifactType": {"name": version.kind},
        "description": None,
        "metadata": json.dumps(version.metadata),
        "ttlDurationSeconds": -2,
        "ttlIsInherited": True,
        "tags": [],
        "historyStep": None,
        "state": version.state,
        "size": sum(map(len, version.files.values())),
        "digest": version.digest,
        "commitHash": "c0",
        "fileCount": len(version.files),
        "createdAt": TIME,
        "updatedAt": TIME,
        "aliases": [
            {"__typename": "ArtifactAlias", "id": a, "alias": a, "artifactCollection": collection}
            for a in version.aliases
        ],
    }


def _answer(server: Server, operation: str, query: str, values: dict[str, Any]) -> dict[str, Any] | None:
    """What a GraphQL operation gives; None: there is no such one here."""
    values = values.get("input") or values
    if operation in ("Viewer", "GetDefaultEntity"):
        teams = {"edges": [{"node": {"name": "team"}}]}
        viewer = {"id": "1", "entity": "team", "username": "me", "email": "", "flags": "{}", "teams": teams}
        return {"viewer": viewer, "serverInfo": {"cliVersionInfo": {}, "exposesExplicitRunQueuePolicies": False}}
    if operation == "ServerFeaturesQuery":
        return {"serverInfo": {"features": []}}
    if operation == "ArtifactMembershipByName":
        if not any((v.entity, v.project) == (values["entity"], values["project"]) for v in server.versions):
            return {"project": None}
        found = server.find(values["entity"], values["project"], values["name"])
        if found is None:
            return {"project": {"artifactCollectionMembership": None}}
        aliases = [{"__typename": "ArtifactAlias", "id": a, "alias": a} for a in found.aliases]
        collection = {"__typename": "ArtifactSequence", "name": found.name, "project": _project(found)}
        membership = {
            "__typename": "ArtifactCollectionMembership",
            "id": f"m-{found.id}",
            "versionIndex": found.number,
            "createdAt": TIME,
            "aliases": aliases,
            "artifactCollection": collection,
            "artifact": _artifact(found),
        }
        return {"project": {"artifactCollectionMembership": membership}}
    if operation == "ArtifactType":
        found = server.find(values["entity"], values["project"], values["name"])
        return {"project": {"artifact": found and {"artifactType": {"name": found.kind}}}}
    if operation == "CreateRunFiles":
        files = [{"name": name, "uploadUrl": f"{server.url}/run/files/{name}"} for name in values["files"]]
        return {"createRunFiles": {"runID": "b1", "uploadHeaders": [], "files": files}}
    if operation == "UpsertBucket":
        project = {"id": "p1", "name": values["project"], "entity": {"id": "e1", "name": values["entity"] or "team"}}
        bucket = {
            "id": "b1", "name": values["name"], "displayName": values["displayName"] or "run", "description": "",
            "config": "{}", "sweepName": None, "project": project, "historyLineCount": 0,
        }  # fmt: skip
        return {"upsertBucket": {"bucket": bucket, "inserted": True}}
    if operation == "CreateArtifact":
        if server.uploads_fail:
            return None
        entity, project = values["entityName"], values["projectName"]
        name = values["artifactCollectionName"]
        metadata = json.loads(values.get("metadata") or "{}")
        aliases = [each["alias"] for each in values.get("aliases") or []]
        made = server.add(name, {}, *aliases, kind=values["artifactTypeName"], entity=entity, project=project)
        made.metadata, made.state, made.digest = metadata, "PENDING", values["digest"]
        made.aliases = list(dict.fromkeys(made.aliases))
        latest = {"id": made.id, "versionIndex": made.number}
        return {"createArtifact": {"artifact": {"id": made.id, "state": "PENDING",
                                                "artifactSequence": {"latestArtifact": latest}}}}  # fmt: skip
    if operation in ("CreateArtifactManifest", "UpdateArtifactManifest"):
        id = values.get("artifactID") or values["artifactManifestID"].removeprefix("manifest-")
        file = {"id": "f1", "name": "wandb_manifest.json", "displayName": "wandb_manifest.json",
                "uploadUrl": f"{server.url}/upload/{id}/wandb_manifest.json", "uploadHeaders": []}  # fmt: skip
        made_manifest = {"artifactManifest": {"id": f"manifest-{id}", "file": file}}
        return {operation[0].lower() + operation[1:]: made_manifest}
    if operation == "CreateArtifactFiles":
        edges = [
            {"node": {"id": "f", "name": each["name"], "displayName": each["name"], "uploadHeaders": [],
                      "uploadUrl": f"{server.url}/upload/{each['artifactID']}/{each['name']}",
                      "storagePath": f"{each['artifactID']}/{each['name']}", "artifact": {"id": each["artifactID"]},
                      "uploadMultipartUrls": None}}
            for each in values["artifactFiles"]
        ]  # fmt: skip
        return {"createArtifactFiles": {"files": {"edges": edges}}}
    if operation == "CommitArtifact":
        made = server.of(values["artifactID"])
        made.state = "COMMITTED"
        return {"commitArtifact": {"artifact": {"id": made.id, "digest": made.digest}}}
    if operation == "UseArtifact":
        server.used.append(values["artifactID"])
        return {"useArtifact": {"artifact": {"id": values["artifactID"], "digest": "d"}}}
    if operation == "FetchArtifactManifest":
        return {"artifact": {"currentManifest": {"file": {"directUrl": f"{server.url}/manifest/{values['id']}"}}}}
    if operation == "ArtifactByID":
        return {"artifact": _artifact(server.of(values["id"]))}
    if operation == "GetArtifactMembershipFileUrls":
        found = server.find(values["entity"], values["project"], f"{values['collection']}:{values['alias']}")
        assert found is not None
        edges = [
            {"node": {"__typename": "File", "name": name, "directUrl": f"{server.url}/files/{found.id}/{name}"}}
            for name in found.files
        ]
        page = {"__typename": "PageInfo", "endCursor": None, "hasNextPage": False}
        files = {"pageInfo": page, "edges": edges}
        membership = {"artifactMembership": {"files": files}, "__typename": "ArtifactSequence"}
        return {"project": {"artifactCollection": membership}}
    return None


class _Handler(BaseHTTPRequestHandler):
    server_state: Server

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        state = self.server_state
        if self.path != "/graphql":
            state.counts[f"POST {self.path}"] += 1
            return self._send(200, b"{}")
        asked = json.loads(body)
        query = asked.get("query", "")
        named = re.search(r"\b(?:query|mutation)\s+(\w+)", query)
        operation = named[1] if named else ""
        state.counts[operation] += 1
        if base64.b64encode(f"api:{KEY}".encode()).decode() not in self.headers.get("authorization", ""):
            if operation == "Viewer":
                return self._json({"data": {"viewer": None}})
            return self._send(401, b'{"errors": [{"message": "permission denied"}]}')
        found = _answer(state, operation, query, asked.get("variables") or {})
        if found is None:
            state.unknown.append(f"{operation}: {json.dumps(asked)[:3000]}")
            return self._json({"errors": [{"message": f"no {operation} here"}]})
        return self._json({"data": found})

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        kind, id, name = unquote(self.path).lstrip("/").split("/", 2)
        if kind == "upload" and name != "wandb_manifest.json":
            self.server_state.of(id).files[name] = body
        self._send(200, b"")

    def do_GET(self) -> None:
        kind, _, rest = unquote(self.path).lstrip("/").partition("/")
        state = self.server_state
        state.counts[f"GET {kind}"] += 1
        if kind == "manifest":
            return self._json(state.of(rest).manifest())
        if kind == "files":
            id, _, name = rest.partition("/")
            body = state.of(id).files[name]
            return self._send(200, body[::-1] if state.damaged else body)
        return self._send(404, b"")

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode())

    def _send(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        pass


@contextmanager
def serve() -> Iterator[Server]:
    state = Server()
    handler = type("Handler", (_Handler,), {"server_state": state})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        state.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield state
        finally:
            server.shutdown()
            thread.join()
