"""How many tokens a text has: counted with a tokenizer, or estimated.

The tokenizer is that of the package tokenizers, read from its one file: transformers would bring torch with it, and
more memory than all the rest takes.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from luthier.errors import ModelError, cannot_load

log = logging.getLogger("luthier")

BYTES_PER_TOKEN = 2
"""The estimate where no tokenizer is given: logs have many digits, so tokens are short. It errs on the safe side."""


class TokenCount:
    """Counts tokens; `around`: those that training puts at the beginning and the end of a row."""

    def __init__(self, name: str | None) -> None:
        """Raises ModelError: no such tokenizer, or none that is a single file."""
        self._tokenizer: Any = None
        self.around = 2
        if name is None:
            return
        from tokenizers import Tokenizer

        path = _file(name)
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises nothing more exact
            raise cannot_load("tokenizer", name, error) from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.around = 1 + self._tokenizer.num_special_tokens_to_add(False)

    @property
    def estimates(self) -> bool:
        return self._tokenizer is None

    def of(self, text: str) -> int:
        if self._tokenizer is None:
            return (len(text) if text.isascii() else len(text.encode("utf-8"))) // BYTES_PER_TOKEN + 1
        return len(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def cut(self, text: str, tokens: int) -> int:
        """How many characters of a text have at most that many tokens; at least one."""
        if self._tokenizer is None:
            size = tokens * BYTES_PER_TOKEN - BYTES_PER_TOKEN
            if not text.isascii():
                size = len(text.encode("utf-8")[:size].decode("utf-8", "ignore"))
            return max(size, 1)
        # The first tokens of a bounded piece; a piece may be cut into tokens a little differently than the whole.
        piece = text[: max(tokens, 1) * 8]
        offsets = self._tokenizer.encode(piece, add_special_tokens=False).offsets
        end = offsets[tokens - 1][1] if len(offsets) >= tokens else len(piece)
        while end > 1 and self.of(text[:end]) > tokens:
            end -= max(1, end // 50)
        return max(end, 1)


def _file(name: str) -> Path:
    """The tokenizer.json of a folder or of a model on the hub."""
    folder = Path(name).expanduser()
    if folder.is_file():
        return folder
    if folder.is_dir():
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ModelError(f"--tokenizer {name}: there is no tokenizer.json in that folder")
        return path
    if folder.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise ModelError(f"--tokenizer {name}: there is no such folder")
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(name, "tokenizer.json"))
    except Exception as error:  # of many kinds: gated, offline, not there
        raise cannot_load("tokenizer", name, error) from error
