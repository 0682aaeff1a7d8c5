"""What a config needs besides itself, and how it comes into the pod.

A pod sees the image, its volumes and what the ConfigMap holds, and nothing of the machine that a job is launched from.
So each key of the config that may name a file is looked at, and one of these holds:

- an id on the hub: the pod downloads it;
- an absolute path below a volume of the pod (`--mount`, or the job's own at /luthier): left as it is;
- a small file here (rows, a template): travels in the ConfigMap, and an override points to it;
- an absolute path that is not here: taken to be in the image, which is said;
- anything else here (a model, a folder, a large file): an error that says where to put it.

The YAML itself travels as it was written, with its comments; all that has to be different in the pod are overrides.
"""

from __future__ import annotations

import glob
import json
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from luthier.config import Config, DatasetEntry
from luthier.config.artifact_names import is_artifact
from luthier.errors import ConfigError
from luthier.launch.kubernetes.settings import CONFIGS, SCRIPT, VOLUME, Settings, refuse_secret

log = logging.getLogger("luthier")

# Kubernetes takes 1 MiB in one ConfigMap, the script among it.
MOST_BYTES = 900_000
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", re.ASCII)
_DATA_ENDINGS = (".json", ".jsonl", ".csv", ".parquet", ".arrow", ".gz", ".zst", ".bz2", ".xz")
_LOADERS = ("json", "csv", "parquet", "arrow")


@dataclass
class Parcel:
    """Attributes:
    config_name: the YAML's key in the ConfigMap. files: what the ConfigMap holds, by key.
    overrides: arguments of `luthier train` in the pod, those of the command line first.
    """

    config_name: str
    files: dict[str, bytes] = field(default_factory=dict)
    overrides: list[str] = field(default_factory=list)

    def add(self, path: Path, key: str) -> str:
        """Take a file along; gives its path in the pod."""
        content = path.read_bytes()
        name = _key_of(path)
        if self.files.get(name, content) != content or name == SCRIPT:
            name = f"{len(self.files)}-{name}"
        total = sum(map(len, self.files.values())) + len(content)
        if total > MOST_BYTES:
            raise ConfigError(
                f"{key}: {path} cannot travel in the job's ConfigMap: that holds {MOST_BYTES:,} bytes, and it would be "
                f"{total:,}. {_elsewhere(path.name)}"
            )
        self.files[name] = content
        log.info("%s: %s travels in the ConfigMap (%s bytes)", key, path, f"{len(content):,}")
        return f"{CONFIGS}/{name}"


def refuse_secrets(path: Path, overrides: Sequence[str]) -> None:
    """Raises ConfigError for a token in the YAML or among the overrides; before a message could repeat it."""
    if path.is_file():
        refuse_secret(str(path), path.read_text(encoding="utf-8", errors="replace"))
    for at, override in enumerate(overrides):
        refuse_secret(f"the command line's override number {at + 1}", override)


def pack(path: Path, overrides: Sequence[str], config: Config, settings: Settings) -> Parcel:
    """The config and what goes with it.

    Raises:
        ConfigError: something cannot be in the pod.
    """
    parcel = Parcel(_key_of(path))
    parcel.files[parcel.config_name] = path.read_bytes()
    places = _Places(settings, parcel)
    changes = [*_of_model(config, places), *_of_datasets(config, places)]
    _own(config)
    parcel.overrides = [*overrides, *(f"{key}={value}" for key, value in changes)]
    for key, value in changes:
        log.info("in the pod: %s=%s", key, value)
    return parcel


def _own(config: Config) -> None:
    """What the job decides by itself, where the config says otherwise."""
    output = config.output
    if isinstance(output.resume_from_checkpoint, str) and output.resume_from_checkpoint != "auto":
        raise ConfigError(
            f"{config.place('resume_from_checkpoint')}resume_from_checkpoint: {output.resume_from_checkpoint}: a job "
            "goes on from the last checkpoint on its volume by itself; leave this key out"
        )
    if output.overwrite_output_dir:
        log.warning("overwrite_output_dir: where its volume holds a checkpoint of the run, a job goes on from that")
    if output.save_steps is None and output.saves_per_epoch == 0:
        log.warning("saves_per_epoch: 0: after a failure without checkpoints the job begins from the first step again")


def _key_of(path: Path) -> str:
    """A name that a ConfigMap takes as a key."""
    return re.sub(r"[^-._a-zA-Z0-9]", "_", path.name)


# --- keys that may name files --------------------------------------------------------------------------------------


def _of_model(config: Config, places: _Places) -> Iterator[tuple[str, str]]:
    model, data = config.model, config.data
    places.model("base_model", model.base_model, config)
    places.model("tokenizer_config", model.tokenizer_config, config)
    places.model("lora_model_dir", config.adapter.lora_model_dir, config)
    for key, value in (("chat_template", data.chat_template), ("chat_template_jinja", data.chat_template_jinja)):
        if (there := places.template(key, value)) is not None:
            yield key, there
    if data.dataset_prepared_path:
        yield "dataset_prepared_path", f"{VOLUME}/datasets"
    if config.origins["deepspeed"].startswith("derived: "):  # a file's settings, which the config has read
        yield "deepspeed", json.dumps(config.distributed.deepspeed)


def _of_datasets(config: Config, places: _Places) -> Iterator[tuple[str, str]]:
    for group in ("datasets", "test_datasets"):
        for index, entry in enumerate(getattr(config.data, group)):
            here = f"{group}.{index}"
            if (template := places.template(f"{here}.chat_template", entry.chat_template)) is not None:
                yield f"{here}.chat_template", template
            yield from _of_dataset(here, entry, places)


def _of_dataset(here: str, entry: DatasetEntry, places: _Places) -> Iterator[tuple[str, str]]:
    if entry.path in _LOADERS and entry.data_files and not Path(entry.path).exists():
        given = [entry.data_files] if isinstance(entry.data_files, str) else list(entry.data_files)
        there = [places.file(f"{here}.data_files", each) for each in given]
        if there != given:
            yield f"{here}.data_files", json.dumps(there)
        return
    path, hash_, count = entry.path, "", ""
    if (match := re.fullmatch(r"(.+)(#)(\d+)", path)) and not Path(path).expanduser().exists():
        path, hash_, count = match.groups()
    if is_artifact(path) or (not Path(path).expanduser().exists() and _is_hub_id(path)):
        return
    moved = places.file(f"{here}.path", path)
    if moved != path:
        yield f"{here}.path", f"{moved}{hash_}{count}"


class _Places:
    """Where in the pod a file or a folder of the config is."""

    def __init__(self, settings: Settings, parcel: Parcel) -> None:
        self._roots = [PurePosixPath(VOLUME), *(PurePosixPath(mount.path) for mount in settings.mounts)]
        self._parcel = parcel

    def model(self, key: str, value: str | None, config: Config) -> None:
        """A model, a tokenizer, an adapter: from the hub, a volume or the image."""
        if value is None or is_artifact(value) or self._in_the_pod(key, value):
            return
        if Path(value).expanduser().exists():
            raise ConfigError(
                f"{config.place(key)}{key}: {value} is on this machine and not in the pod. {_elsewhere(value)}"
            )
        if not _HUB_ID.fullmatch(value):
            raise ConfigError(
                f"{config.place(key)}{key}: {value} is neither an id on the hub nor an absolute path in the pod"
            )

    def template(self, key: str, value: str | None) -> str | None:
        """A chat template that is a file: where it is in the pod, if that is elsewhere."""
        if not value or "\n" in value or "{" in value or not (value.endswith(".jinja") or Path(value).is_file()):
            return None
        there = self.file(key, value)
        return None if there == value else there

    def file(self, key: str, value: str) -> str:
        """A file: its path in the pod, where it is taken along if it is not there already."""
        if self._in_the_pod(key, value):
            return value
        path = Path(value).expanduser()
        if path.is_file():
            return self._parcel.add(path, key)
        if path.is_dir() or (glob.has_magic(value) and glob.glob(str(path), recursive=True)):
            raise ConfigError(
                f"{key}: {value} is on this machine and not in the pod, and only single files travel with a job. "
                + _elsewhere(value)
            )
        raise ConfigError(f"{key}: {value}: there is no such file here, and it is no id on the hub")

    def _in_the_pod(self, key: str, value: str) -> bool:
        if not value.startswith("/"):
            return False
        if any(PurePosixPath(value).is_relative_to(root) for root in self._roots):
            return True
        if Path(value).exists() or glob.glob(value):
            return False
        log.warning("%s: %s is below no volume of the pod: the image has to hold it", key, value)
        return True


def _is_hub_id(path: str) -> bool:
    return bool(_HUB_ID.fullmatch(path)) and not path.endswith(_DATA_ENDINGS)


def _elsewhere(name: str) -> str:
    last = PurePosixPath(name).name or name
    return (
        f"Put it on the hub and write its id; or on a volume, --mount CLAIM:/data, and write /data/{last}; or into the "
        "image, and write its absolute path there"
    )
