"""Tokenizers that came from SentencePiece, as llama.cpp reads them: pieces with scores instead of merges.

Hugging Face's file has the merges in order; llama.cpp joins whichever neighbours make the piece with the best score.
The two are the same algorithm if a piece's score is the place of its first merge, and if all merges to one piece stand
together, as those of converted vocabularies do. Whether they do is found by trying: `ids` is llama.cpp's algorithm,
and has to give the same for many texts.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from luthier.errors import ModelError

SPACE = "\u2581"
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_NEVER = -1e9  # of pieces that no merge leads to


@dataclass(frozen=True)
class Pieces:
    """Attributes:
    scores: by id. prefix: a space is put before a text. legacy: and behind a special token too, as llama.cpp does.
    added: tokens that are found in a text first.
    """

    vocab: Mapping[str, int]
    scores: Mapping[int, float]
    prefix: bool
    legacy: bool
    added: Mapping[str, int]
    unknown: int
    bytes: Mapping[int, int] = field(default_factory=dict)

    def ids(self, text: str) -> list[int]:
        """What llama.cpp makes of a text."""
        found: list[int] = []
        behind_special = True
        for part in self._parts(text):
            if part in self.added:
                found.append(self.added[part])
                behind_special = True
                continue
            opened = f" {part}" if self.prefix and behind_special else part
            found += self._merged(opened.replace(" ", SPACE))
            behind_special = False
        return found

    def _parts(self, text: str) -> list[str]:
        if not self.added:
            return [text] if text else []
        longest_first = sorted(self.added, key=len, reverse=True)
        pattern = "(" + "|".join(map(re.escape, longest_first)) + ")"
        return [part for part in re.split(pattern, text) if part]

    def _merged(self, text: str) -> list[int]:
        symbols: list[str | None] = list(text)
        before, after = list(range(-1, len(text) - 1)), [*range(1, len(text)), -1]
        heap: list[tuple[float, int, int, str]] = []

        def consider(left: int, right: int) -> None:
            if left < 0 or right < 0:
                return
            joined = f"{symbols[left]}{symbols[right]}"
            if (token := self.vocab.get(joined)) is not None:
                heapq.heappush(heap, (-self.scores.get(token, 0.0), left, right, joined))

        for at in range(1, len(text)):
            consider(at - 1, at)
        while heap:
            _, left, right, joined = heapq.heappop(heap)
            first, second = symbols[left], symbols[right]
            if first is None or second is None or after[left] != right or first + second != joined:
                continue
            symbols[left], symbols[right] = joined, None
            after[left] = after[right]
            if after[right] >= 0:
                before[after[right]] = left
            consider(before[left], left)
            consider(left, after[left])
        ids: list[int] = []
        for symbol in symbols:
            if symbol is None:
                continue
            if symbol in self.vocab:
                ids.append(self.vocab[symbol])
            else:
                ids += [self.bytes.get(byte, self.unknown) for byte in symbol.encode()]
        return ids


def is_byte(token: str) -> bool:
    return _BYTE.fullmatch(token) is not None


def read_pieces(spec: Mapping[str, Any], name: str) -> Pieces:
    """From `tokenizer.json`.

    Raises:
        ModelError: spaces or other characters are treated in a way that llama.cpp does not have.
    """
    model = spec["model"]
    vocab: dict[str, int] = model["vocab"]
    prefix, legacy = _spaces(spec, name)
    scores: dict[int, float] = {}
    for place, merge in enumerate(model["merges"]):
        left, right = merge if isinstance(merge, list) else merge.split(" ", 1)
        scores.setdefault(vocab[left + right], -float(place + 1))
    for token, number in vocab.items():
        if number not in scores:
            scores[number] = 0.0 if len(token) == 1 or is_byte(token) else _NEVER
    in_bytes = {int(match[1], 16): number for token, number in vocab.items() if (match := _BYTE.fullmatch(token))}
    if len(in_bytes) != 256:
        raise ModelError(f"{name}: its tokenizer has {len(in_bytes)} of the 256 byte tokens that llama.cpp needs")
    added = {token["content"]: int(token["id"]) for token in spec.get("added_tokens") or []}
    unknown = vocab.get(model.get("unk_token") or "", 0)
    return Pieces(vocab, scores, prefix, legacy, added, unknown, in_bytes)


def differing(pieces: Pieces, texts: Sequence[str], expected: Sequence[Sequence[int]]) -> tuple[list[str], list[str]]:
    """Texts that become other tokens in llama.cpp: those that do for a known reason, and the others."""
    known: list[str] = []
    other: list[str] = []
    for text, ids in zip(texts, expected, strict=True):
        if pieces.ids(text) != list(ids):
            # It puts its space before a space, too, and behind each special token.
            first = text[:1] == " "
            special = any(token in text for token in pieces.added)
            (known if pieces.prefix and not pieces.legacy and (first or special) else other).append(text)
    return known, other


def _spaces(spec: Mapping[str, Any], name: str) -> tuple[bool, bool]:
    """Whether a space is put before a text, and whether it is exactly as llama.cpp does it."""
    steps = _steps(spec.get("normalizer"), "normalizers")
    cuts = _steps(spec.get("pre_tokenizer"), "pretokenizers")
    prefix, legacy = False, True
    for step in steps:
        if step["type"] == "Prepend" and step["prepend"] == SPACE:
            prefix = True
        elif not (step["type"] == "Replace" and step["pattern"] == {"String": " "} and step["content"] == SPACE):
            raise ModelError(f"{name}: its tokenizer changes texts first ({step['type']}), and llama.cpp does not")
    for cut in cuts:
        if cut["type"] == "Metaspace":
            prefix, legacy = cut["prepend_scheme"] != "never", cut["prepend_scheme"] == "never"
        # After spaces have become something else, cutting at spaces cuts nothing.
        elif not (cut["type"] == "Split" and cut["pattern"] == {"String": " "} and steps):
            raise ModelError(f"{name}: its tokenizer cuts texts ({cut['type']}) in a way that llama.cpp does not have")
    return prefix, legacy


def _steps(part: Mapping[str, Any] | None, inner: str) -> list[Mapping[str, Any]]:
    if part is None:
        return []
    return list(part[inner]) if part["type"] == "Sequence" else [part]
