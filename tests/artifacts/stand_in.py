"""A stand-in of the package wandb: of its API what Luthier calls, over artifacts in memory.

`test_stand_in` compares its signatures with the real package's where that is installed.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from tests.artifacts.wandb_server import Server, Version, md5


class CommError(Exception):
    pass


class UsageError(Exception):
    pass


class Logged:
    """An artifact of the server, as the client gives it."""

    def __init__(self, wandb: Wandb, version: Version) -> None:
        self._wandb, self._version = wandb, version
        self.entity, self.project, self.version = version.entity, version.project, f"v{version.number}"
        self.name, self.type, self.digest = f"{version.name}:{self.version}", version.kind, version.digest
        self.state, self.aliases, self.metadata = version.state, version.aliases, version.metadata
        entries = {
            name: SimpleNamespace(path=name, digest=md5(body), size=len(body), ref=None)
            for name, body in version.files.items()
        }
        self.manifest = SimpleNamespace(entries=entries)

    def download(
        self,
        root: Any = None,
        allow_missing_references: bool = False,
        skip_cache: bool | None = None,
        path_prefix: Any = None,
        multipart: bool | None = None,
    ) -> str:
        self._wandb.downloads.append((self.name, path_prefix))
        for name, body in self._version.files.items():
            if not path_prefix or name.startswith(path_prefix):
                path = Path(root) / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(body[::-1] if self._wandb.server.damaged else body)
        return str(root)

    def wait(self, timeout: int | None = None) -> Logged:
        return self


class Artifact:
    def __init__(
        self, name: str, type: str, description: str | None = None, metadata: dict[str, Any] | None = None
    ) -> None:
        self.name, self.type, self.metadata, self.files = name, type, metadata or {}, {}

    def add_file(self, local_path: str, name: str | None = None) -> None:
        self.files[name] = Path(local_path).read_bytes()

    @contextmanager
    def new_file(self, name: str, mode: str = "x", encoding: str | None = None) -> Iterator[Any]:
        opened = io.BytesIO()
        yield opened
        self.files[name] = opened.getvalue()


@dataclass
class Run:
    wandb: Wandb
    entity: str
    project: str
    dir: str
    offline: bool = False
    used: list[str] = field(default_factory=list)

    def log_artifact(
        self, artifact_or_path: Any, name: str | None = None, type: str | None = None, aliases: Any = None
    ) -> Logged:
        if self.wandb.server.uploads_fail:
            raise CommError("503 Service Unavailable")
        made = artifact_or_path
        version = self.wandb.server.add(
            made.name, made.files, *[a for a in aliases if a != "latest"], kind=made.type, entity=self.entity,
            project=self.project,
        )  # fmt: skip
        version.metadata = made.metadata
        return Logged(self.wandb, version)

    def use_artifact(self, artifact_or_name: Any, type: str | None = None) -> None:
        self.wandb.server.used.append(artifact_or_name)

    def log(self, *args: Any, **kwargs: Any) -> None:
        pass

    def finish(self) -> None:
        pass

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *error: object) -> None:
        pass


@dataclass
class Wandb:
    """Attributes:
    downloads: the name and the part of each. key: whether somebody is logged in.
    """

    server: Server
    folder: Path
    key: bool = True
    downloads: list[tuple[str, str | None]] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)

    def module(self) -> ModuleType:
        module: Any = ModuleType("wandb")
        module.__version__ = "0.31.0"
        module.Api, module.Artifact, module.init = self._api, Artifact, self._init
        module.Settings = SimpleNamespace
        module.config = SimpleNamespace(update=lambda values, allow_val_change: None)
        module.Table = lambda **values: values
        return module

    def _api(self) -> Any:
        if not self.key:
            raise UsageError("No API key configured. Use `wandb login` to log in.")
        return SimpleNamespace(artifact=self._find)

    def _find(self, name: str, type: str | None = None) -> Logged:
        parts = ["team", *name.split("/")][-3:]
        if (found := self.server.find(*parts)) is None:
            raise ValueError(f"artifact membership {parts[-1]!r} not found in {'/'.join(parts[:2])!r}")
        return Logged(self, found)

    def _init(self, project: str, entity: str | None = None, **others: Any) -> Run:
        offline = others.get("mode") == "offline"
        made = Run(self, entity or "team", project, str(self.folder / "run" / "files"), offline)
        self.runs.append(made)
        return made
