"""What is uploaded of a run, an adapter or a model folder: named one by one, so that nothing goes along unseen.

The weights, what is needed to load them (configs, tokenizer, chat template), the card, the plot of the losses, and the
run's config.yaml. Never checkpoints, optimizer state, data, logs or `environment.json`. Weights and tokenizer are the
files as they are; in configs, card and page, paths of this machine and secrets are replaced (`export.scrub`).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from luthier.artifacts.source import reference_of
from luthier.config.artifact_names import is_artifact
from luthier.errors import ConfigError, RunError
from luthier.export import folder as folders
from luthier.export.card import Subject, is_hub_id, licence_of, make_card
from luthier.export.scrub import Scrub, public_name
from luthier.models import adapter_files
from luthier.models.assemble import RUN_CONFIG

log = logging.getLogger("luthier")

CARD, PLOT, REPORT, INDEX = "README.md", "loss.png", "report.html", "model.safetensors.index.json"

_CONFIGS = (
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "*processor_config.json",
)
_AS_THEY_ARE = (*folders.TOKENIZER_FILES, "*.py", "LICENSE*", "NOTICE*", "USE_POLICY*")
# Keys of a run's config that only mean something where it ran.
_OF_HERE = (
    "dataset_prepared_path",
    "lora_model_dir",
    "output_dir",
    "overwrite_output_dir",
    "report_to",
    "resume_from_checkpoint",
)


@dataclass
class Parcel:
    """Attributes:
    files: name in the repository -> a file, or its content. is_adapter: an adapter, else a whole model. base: the
        base's id on the hub. remarks: what was replaced or left out, in words.
    """

    is_adapter: bool
    base: str | None = None
    files: dict[str, Path | bytes] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)

    def sizes(self) -> dict[str, int]:
        return {n: len(f) if isinstance(f, bytes) else f.stat().st_size for n, f in self.files.items()}


def pack(
    target: str,
    repo: str,
    *,
    merged: bool = False,
    gguf: Sequence[str] = (),
    report: bool = False,
    base_model: str | None = None,
    licence: str | None = None,
    revision: str | None = None,
    secrets: Sequence[str | None] = (),
    artifact: bool = False,
) -> Parcel:
    """Collect what is uploaded.

    Args:
        target: a run, an adapter or a model folder. repo: owner/name. merged: the run's merge instead of its adapter.
        gguf: files to add. report: add report.html. base_model: the base's id on the hub, where the folder names a
            local copy. licence: the hub's name of the licence. revision: a branch other than the main one. secrets:
                never to be published, beside what the environment holds. artifact: it goes to Weights & Biases, where a
            base or data that is an artifact keeps that name; elsewhere it would tell an account's name.

    Raises:
        ConfigError, RunError, ModelError: there is nothing whole to upload.
    """
    source, run = _source(Path(target).expanduser(), merged)
    is_adapter = (source / adapter_files.CONFIG).is_file()
    named = _base_name(source, run, is_adapter)
    base = base_model or _public_base(named)
    if base is not None and not is_hub_id(base) and not (artifact and is_artifact(base)):
        raise ConfigError(f"--base-model: {base} is no id on the hub (owner/name)")
    if base is None and artifact and named is not None:
        base = named if is_artifact(named) else reference_of(named)
    parcel, scrub = Parcel(is_adapter, base), Scrub(secrets)
    _add_weights(parcel, source)
    for pattern in _AS_THEY_ARE:
        for path in sorted(source.glob(pattern)):
            for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
                if file.is_file() and not file.name.startswith("."):
                    parcel.files[file.relative_to(source).as_posix()] = file
    for pattern in (adapter_files.CONFIG,) if is_adapter else _CONFIGS:
        for path in sorted(source.glob(pattern)):
            parcel.files[path.name] = _clean_json(path, scrub, base if is_adapter else None, named)
    for name in _CONFIGS[1:] if is_adapter else ():
        for path in sorted(source.glob(name)):
            parcel.files[path.name] = _clean_json(path, scrub, None, None)
    if run is not None:
        parcel.files[RUN_CONFIG] = _clean_config(run / RUN_CONFIG, scrub, base, artifact)
        if (run / PLOT).is_file() and not _is_checkpoint(source):
            parcel.files[PLOT] = run / PLOT
    _add_extras(parcel, run, gguf, report, scrub)
    subject = Subject(
        repo=repo,
        is_adapter=is_adapter,
        base=base if base is not None and is_hub_id(base) else None,
        base_name=base if is_artifact(base) else public_name(named) if named else None,
        revision=revision,
        gguf=[Path(name).name for name in gguf],
        settings=RUN_CONFIG in parcel.files,
        licence=licence,
        plot=PLOT in parcel.files,
    )
    card = make_card(scrub.text(_card_text(source, run)), subject)
    parcel.files[CARD] = card.encode("utf-8")
    parcel.remarks += _remarks(subject, card, scrub)
    return parcel


def _source(folder: Path, merged: bool) -> tuple[Path, Path | None]:
    """The folder that holds the weights, and that of the run if one is known."""
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise ConfigError(f"{folder} {what}; name a run, an adapter or a model folder")
    run = folder if (folder / RUN_CONFIG).is_file() else None
    has_adapter, has_model = (folder / adapter_files.CONFIG).is_file(), (folder / "config.json").is_file()
    if merged:
        return _merge_of(folder, has_model and not has_adapter), run
    if not has_adapter and not has_model:
        if run is not None:
            raise RunError(
                f"{folder}: the run has not ended yet, or was cut off: no adapter or model at its top. Go on with "
                "resume_from_checkpoint: auto, or name one of its checkpoint-N folders"
            )
        raise ConfigError(
            f"{folder}: neither a run, an adapter nor a model: {adapter_files.CONFIG} or config.json is missing"
        )
    if run is None and ((folder / folders.RECORD).is_file() or _is_checkpoint(folder)):
        above = folder.resolve().parent  # a merge and a checkpoint lie in their run
        run = above if (above / RUN_CONFIG).is_file() else None
    return folder, run


def _is_checkpoint(folder: Path) -> bool:
    return folder.name.startswith("checkpoint-")


def _merge_of(folder: Path, is_model: bool) -> Path:
    source = folder / "merged"
    if is_model:
        raise ConfigError(f"--merged: {folder} holds a whole model and no adapter; leave --merged out")
    if not (source / "config.json").is_file():
        raise ConfigError(f"--merged: there is no merged model in {source}; make it first: luthier merge-lora {folder}")
    weights = folder / adapter_files.WEIGHTS
    if weights.is_file() and weights.stat().st_mtime > (source / "config.json").stat().st_mtime:
        log.warning(
            "%s is newer than the merged model; if it was trained on since, merge again: "
            "luthier merge-lora %s --overwrite",
            weights,
            folder,
        )
    return source


def _base_name(source: Path, run: Path | None, is_adapter: bool) -> str | None:
    """What the weights were made from, as the files name it."""
    found: Any = None
    if is_adapter:
        found = folders.read_json(source / adapter_files.CONFIG).get("base_model_name_or_path")
    elif (source / folders.RECORD).is_file():
        found = folders.read_json(source / folders.RECORD).get("base_model")
    elif run is not None:
        found = _read_yaml(run / RUN_CONFIG).get("base_model")
    return found if isinstance(found, str) and found else None


def _public_base(name: str | None) -> str | None:
    """The base's id on the hub, None where it is a folder of this machine that did not come from there."""
    if name is None:
        return None
    if Path(name).expanduser().exists() or not is_hub_id(name):
        public = public_name(name)
        return public if "/" in public and is_hub_id(public) else None
    return name


def _add_weights(parcel: Parcel, source: Path) -> None:
    if parcel.is_adapter:
        names = [n for n in (adapter_files.WEIGHTS, adapter_files.PICKLED) if (source / n).is_file()][:1]
        if not names:
            raise RunError(f"{source}: {adapter_files.WEIGHTS} is missing")
    else:
        names = sorted(p.name for p in source.glob("model*.safetensors") if not p.name.startswith("."))
        if (source / INDEX).is_file():
            mapped = folders.read_json(source / INDEX).get("weight_map")
            listed = sorted(set(mapped.values())) if isinstance(mapped, dict) else []
            if lacking := [name for name in listed if not (source / name).is_file()]:
                raise RunError(f"{source}: {len(lacking)} of {len(listed)} files of weights are missing ({lacking[0]})")
            names = [INDEX, *listed]
        if not names:
            raise RunError(f"{source}: no weights here (model*.safetensors)")
    for name in names:
        parcel.files[name] = source / name


def _add_extras(parcel: Parcel, run: Path | None, gguf: Sequence[str], report: bool, scrub: Scrub) -> None:
    for name in gguf:
        path = Path(name).expanduser()
        try:
            with path.open("rb") as file:
                magic = file.read(4)
        except OSError as error:
            raise ConfigError(f"--gguf: {path} cannot be read: {error.strerror or error}") from error
        if magic != b"GGUF":
            raise ConfigError(f"--gguf: {path} is no GGUF file")
        if path.name in parcel.files:
            raise ConfigError(f"--gguf: two files are called {path.name}")
        parcel.files[path.name] = path
    if report:
        page = run / REPORT if run is not None else None
        if page is None or not page.is_file():
            raise ConfigError(f"--report: there is no {REPORT}; make it first: luthier report {run or 'RUN'}")
        parcel.files[REPORT] = scrub.text(page.read_text(encoding="utf-8")).encode("utf-8")


def _clean_json(path: Path, scrub: Scrub, base: str | None, named: str | None) -> Path | bytes:
    """The file, or its content where something in it had to be replaced."""
    found = folders.read_json(path)
    clean = scrub.value(found)
    if path.name == adapter_files.CONFIG and named is not None and named != base:
        # A last name alone might be somebody else's model on the hub.
        clean["base_model_name_or_path"] = base
        if base is None:
            clean["revision"] = None
    if clean == found:
        return path
    return (json.dumps(clean, indent=2, ensure_ascii=False) + "\n").encode("utf-8")


def _clean_config(path: Path, scrub: Scrub, base: str | None, artifact: bool) -> bytes:
    """The run's settings, without where it ran and without account names."""
    values = _read_yaml(path)
    kept = {k: v for k, v in values.items() if k not in _OF_HERE and not k.startswith("wandb_")}
    unnamed = is_artifact(str(kept.get("base_model"))) and not artifact
    if base is not None or unnamed or Path(str(kept.get("base_model"))).expanduser().exists():
        kept["base_model"] = base or public_name(str(kept["base_model"]))
    for key in ("datasets", "test_datasets"):
        for entry in kept.get(key) or []:
            where = entry.get("path") if isinstance(entry, dict) else None
            if not isinstance(where, str):
                continue
            if Path(where).expanduser().exists() or (is_artifact(where) and not artifact):
                entry["path"] = public_name(where)
    head = "# The settings of the training; paths are shortened to names.\n"
    return (head + yaml.safe_dump(scrub.value(kept), sort_keys=False, allow_unicode=True)).encode("utf-8")


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RunError(f"{path}: cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(found, dict):
        raise RunError(f"{path}: this is no mapping of keys to values")
    return found


def _card_text(source: Path, run: Path | None) -> str:
    # What a run says about itself is about its end, not about a checkpoint.
    for folder in (source, None if _is_checkpoint(source) else run):
        if folder is not None and (folder / CARD).is_file():
            return (folder / CARD).read_text(encoding="utf-8")
    return ""


def _remarks(subject: Subject, card: str, scrub: Scrub) -> list[str]:
    said = []
    if scrub.paths:
        shown = ", ".join(f"{path} -> {name}" for path, name in list(scrub.paths.items())[:3])
        more = len(scrub.paths) - 3
        said.append(f"paths of this machine are shortened: {shown}" + (f" and {more} more" if more > 0 else ""))
    if scrub.secrets:
        said.append(f"{scrub.secrets} secrets (tokens, keys, passwords) are replaced by ***")
    if subject.base is None and subject.base_name is None:
        said.append("what this was made from is not known, so the card names no base; --base-model OWNER/NAME says it")
    elif subject.base is None and not is_artifact(subject.base_name):
        lost = "; nobody can load it without knowing the base" if subject.is_adapter else ""
        said.append(
            f"the base {subject.base_name} is no model on the hub, so the card names none{lost}. "
            "--base-model OWNER/NAME says which it is"
        )
    if licence_of(card) is None:
        said.append("the card names no licence; --license says it (that of the base mostly binds what is made from it)")
    return said
