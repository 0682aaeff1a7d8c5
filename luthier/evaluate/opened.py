"""The one model or two that a benchmark asks: what they are called, in which format they are asked, how they are opened
and closed again, and what says that one is the same as it was.

A run's base goes by the name `base`. It is opened as the run's config says: stored as in the run, with its tokenizer.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from luthier.config import Config
from luthier.config.datasets import DatasetEntry
from luthier.data.hub import notice_missing_network
from luthier.errors import ConfigError
from luthier.evaluate.results import RUN_CONFIG, digest, run_folder
from luthier.generate.asking import asking_format
from luthier.models.adapter_files import CONFIG as ADAPTER_CONFIG
from luthier.models.adapter_files import read_adapter_config
from luthier.models.assemble import open_base, open_for_inference, tokenizer_for_inference
from luthier.models.quantize import is_quantized

BASE = "base"

# Of a model's config, what says nothing of what the model computes.
_NOT_OF_MODEL = ("_name_or_path", "_commit_hash", "transformers_version", "architectures")


@dataclass(frozen=True)
class Which:
    """One of the models.

    Attributes:
        name: what to call it. path: run, adapter, model folder or hub id. base_of: the run whose base it is, as it was
            given; None for a model that is asked as itself. run: its config, if it is a run, its part or its base.
        tokenizer: what its texts go through.
    """

    name: str
    path: str
    base_of: str | None
    run: Config | None
    tokenizer: Any

    def asking_format(self, *, raw: bool) -> tuple[Config, DatasetEntry]:
        """The config and the entry whose format a prompt is put into; with `raw` that of plain text."""
        return asking_format(self.base_of or self.path, self.tokenizer, self.run, raw=raw)

    def open(self, device: torch.device | None, dtype: torch.dtype | None) -> Any:
        """The model, ready to be asked."""
        if self.base_of is None:
            return open_for_inference(self.path, device=device, dtype=dtype)[0]
        assert self.run is not None
        return open_base(self.run, self.tokenizer, device=device, dtype=dtype)


def which_models(target: str, compare: str | None) -> list[Which]:
    """The target, and what it is compared with; by configs and tokenizers alone.

    Raises:
        ConfigError: `base` of what is no run. ModelError: there is nothing to load.
    """
    if not all(Path(path).expanduser().exists() for path in (target, compare) if path not in (None, BASE)):
        notice_missing_network()
    found = [Which(_short(target), target, None, _run_at(target), tokenizer_for_inference(target))]
    if compare == BASE:
        folder = run_folder(target)
        if folder is None:
            raise ConfigError(
                f"--compare base: {target} is no run, which would say what its base is; give the base's folder or name"
            )
        run = Config.load(folder / RUN_CONFIG)
        found.append(Which(BASE, str(run.model.base_model), target, run, found[0].tokenizer))
    elif compare is not None:
        name = _short(compare) if _short(compare) != found[0].name else compare
        found.append(Which(name, compare, None, _run_at(compare), tokenizer_for_inference(compare)))
    return found


def identity(which: Which, model: Any) -> dict[str, str]:
    """What an answer depends on besides what is asked: the weights, how they are held, and the model's config."""
    config = {name: value for name, value in model.config.to_dict().items() if name not in _NOT_OF_MODEL}
    return {
        "weights": _weights_of(which.path, model),
        "config": digest(_plain(config))[:16],
        "dtype": precision_of(model),
    }


def precision_of(model: Any) -> str:
    """In which numbers a model computes and, where these are others, in which its linear layers are held."""
    computes = str(model.dtype).removeprefix("torch.")
    if not is_quantized(model):
        return computes
    bits = 4 if getattr(model, "is_loaded_in_4bit", False) else 8
    return f"{bits} bits, {computes}"


def _run_at(path: str) -> Config | None:
    folder = run_folder(path)
    return None if folder is None else Config.load(folder / RUN_CONFIG)


def _short(path: str) -> str:
    """A folder's name; of a checkpoint or a merged model its run's as well."""
    folder = Path(path).expanduser()
    if not folder.exists():
        return path
    folder, run = folder.resolve(), run_folder(path)
    return folder.name if run is None or run.resolve() == folder else f"{run.name}/{folder.name}"


def _weights_of(path: str, model: Any) -> str:
    """A short name for what a model's weights are: the hub's commit, or names, sizes and times of the files; an
    adapter's base is part of it."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        return f"{path}@{getattr(model.config, '_commit_hash', None)}"
    files = sorted(each for each in folder.iterdir() if each.suffix in (".safetensors", ".bin", ".json"))
    weights = [each for each in files if each.suffix != ".json" or each.name in ("config.json", ADAPTER_CONFIG)]
    found: list[Any] = [(each.name, each.stat().st_size, each.stat().st_mtime_ns) for each in weights]
    if (folder / ADAPTER_CONFIG).is_file():
        found.append(_weights_of(str(read_adapter_config(folder).get("base_model_name_or_path")), model))
    return digest(found)[:16]


def _plain(value: Any) -> Any:
    """A config as JSON has it; what it has no word for (dtypes, ...) by its text."""
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return value if value is None or isinstance(value, str | int | float | bool) else str(value)
