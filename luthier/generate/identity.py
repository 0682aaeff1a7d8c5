"""What a stored answer depends on, as far as the model goes: which files it is made of, and those of its bases.

Nothing is loaded, so that a command can say what does not fit before it waits for weights.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RUN_CONFIG, ADAPTER_CONFIG, MODEL_CONFIG = "config.yaml", "adapter_config.json", "config.json"
# What answers depend on, of the files at the top of a model's folder: none that a command writes there later.
_OF_MODEL = (
    "*.safetensors",
    "*.bin",
    "*.jinja",
    "*.model",
    RUN_CONFIG,
    ADAPTER_CONFIG,
    MODEL_CONFIG,
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
)


def model_names(target: str) -> list[str]:
    """A model's resolved path or hub id, then that of what it was trained from, and so on."""
    names: list[str] = []
    while target and (name := resolved(target)) not in names:
        names.append(name)
        target = _base_of(Path(name)) or ""
    return names


def resolved(name: str) -> str:
    """The absolute path of what is here; a hub id as it is."""
    path = Path(name).expanduser()
    return str(path.resolve()) if path.exists() else name


def model_files(target: str) -> list[Any]:
    """The files of a model and of its bases with their sizes and times of change, as JSON has them."""
    seen: list[Any] = []
    for name in model_names(target):
        files = sorted({path for pattern in _OF_MODEL for path in Path(name).glob(pattern) if path.is_file()})
        seen.append([name, [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in files]])
    return seen


def _base_of(folder: Path) -> str | None:
    if (folder / ADAPTER_CONFIG).is_file():
        try:
            base = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8")).get("base_model_name_or_path")
        except (OSError, ValueError, AttributeError):
            return None  # opening the adapter says what is wrong with it
        return str(base) if base else None
    inside = folder.name.startswith("checkpoint-") or folder.name in ("merged", "merged-4bit")
    for config in (folder / RUN_CONFIG, *([folder.parent / RUN_CONFIG] if inside else [])):
        if config.is_file():
            from luthier.config import Config

            return Config.load(config).model.base_model
    return None
