"""Adapters and runs on the hub, as the folders that they were pushed from.

transformers loads whole models from the hub by itself. An adapter is more than that: it names the base that it belongs
to; and a run's config.yaml says in which format to ask. Both are fetched into the hub's cache, and used from there.
"""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError

from luthier.errors import cannot_load
from luthier.models.adapter_files import CONFIG, PICKLED, WEIGHTS

_HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+")
_OURS = re.compile(r"^- luthier$", re.MULTILINE)  # the tag in the front matter of a card
# Last the one base of all that the client's HTTP library raises, which is another library from version 2 on.
_FAILURES: tuple[type[Exception], ...] = (OSError, ValueError, HfHubHTTPError.__mro__[1])
_OF_ADAPTER = (CONFIG, WEIGHTS, PICKLED)
_OF_MODEL = ("config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json", "*.py")
_TOKENIZER = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "chat_template*")


def fetched(name: str) -> Path | None:
    """The folder in the hub's cache that holds an adapter, or what `luthier push` put there, by its id.

    Returns:
        None: this is a path, or a model that transformers finds by itself, or nothing that the hub has.

    Raises:
        ModelError: it is there, and cannot be fetched.
    """
    if not _HUB_ID.fullmatch(name) or Path(name).exists():
        return None
    is_adapter = _one(name, CONFIG) is not None
    card = _one(name, "README.md")
    # Another tool's config.yaml means something else.
    is_ours = card is not None and _OURS.search(card.read_text(encoding="utf-8", errors="replace")) is not None
    if not is_adapter and not is_ours:
        return None
    patterns = [*(_OF_ADAPTER if is_adapter else _OF_MODEL), *_TOKENIZER, *(["config.yaml"] if is_ours else [])]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except _FAILURES as error:
        raise cannot_load("adapter" if is_adapter else "model", name, error) from error


def _one(name: str, file: str) -> Path | None:
    """One small file; None where the hub, or without it the cache, does not have it."""
    try:
        return Path(hf_hub_download(name, file))
    except _FAILURES:
        return None
