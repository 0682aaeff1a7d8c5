"""Text to token ids, many texts at a time, with nothing added that the text does not hold.

A document is tokenised in pieces (prompt, answer), so that the ids of the prompt are exactly those from which
generation starts. Two habits of tokenizers stand in the way, and are found by trying them out: some put a
token before every text (BOS), which belongs at the beginning of a document only; and some put a space before
every text (Llama 2's `▁`), which would appear in the middle of a document where there is none.

Fast tokenizers encode a whole batch in one call, in threads of their own; slow ones go text by text.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Put before a text to see it as a continuation; the later ones where a text merges with the first.
_GUARDS = ("\n", "a", "=")
_PROBES = ("b", "The", "x1", "é")


class TextEncoder:
    """One tokenizer's way from text to ids."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer

    @cached_property
    def opening(self) -> list[int]:
        """What the tokenizer puts before a document by itself: BOS, or nothing."""
        plain = self._call(["a"])[0]
        full = list(self.tokenizer("a", add_special_tokens=True)["input_ids"])
        for at in range(len(full) - len(plain) + 1):
            if full[at : at + len(plain)] == plain:
                return full[:at]
        return []

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids that steer the model and never stand for ordinary text."""
        marked = {number for number, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        return frozenset(marked | set(self.tokenizer.all_special_ids))

    @cached_property
    def added_ids(self) -> frozenset[int]:
        """Ids that were added to the vocabulary as a whole, special or not."""
        return self.special_ids | frozenset(self.tokenizer.added_tokens_decoder)

    @cached_property
    def adds_prefix(self) -> bool:
        """Whether a text gets a space before it when it is encoded alone."""
        return any(self._call([word])[0] != self._behind("\n", [word])[0] for word in _PROBES)

    def beginnings(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of texts that begin a document, without BOS."""
        return self._call(texts)

    def continuations(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of texts that stand behind other text, encoded on their own."""
        if not self.adds_prefix:
            return self._call(texts)
        found: list[list[int] | None] = [None if text else [] for text in texts]
        for guard in _GUARDS:
            missing = [at for at, ids in enumerate(found) if ids is None]
            if missing:
                for at, ids in zip(missing, self._behind(guard, [texts[at] for at in missing]), strict=True):
                    found[at] = ids
        # No tokenizer is known that merges a text with each guard; a space would be all that is wrong.
        return [
            ids if ids is not None else self._call([text])[0] for ids, text in zip(found, texts, strict=True)
        ]

    def with_offsets(self, texts: Sequence[str]) -> list[Encoded]:
        """Ids of whole texts, which know where their tokens are in the text; `texts` hold their own BOS."""
        if not self.tokenizer.is_fast:
            return [_SlowEncoded(self, text) for text in texts]
        encodings = self._backend.encode_batch(list(texts), add_special_tokens=False)
        return [_FastEncoded(encoding, self.added_ids) for encoding in encodings]

    def _behind(self, guard: str, texts: Sequence[str]) -> list[list[int] | None]:
        """Ids of texts as they are behind `guard`; None where they merge with it."""
        before = self._call([guard])[0]
        joint = self._call([guard + text for text in texts])
        return [ids[len(before) :] if ids[: len(before)] == before else None for ids in joint]

    def _call(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        if self.tokenizer.is_fast:
            return [
                encoding.ids
                for encoding in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
            ]
        # verbose: no warning about texts beyond the model's length; `excess_length_strategy` is for those.
        return [
            list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]) for text in texts
        ]

    @cached_property
    def _backend(self) -> Any:
        """A copy of the fast tokenizer that neither cuts, pads nor trims.

        Its post-processor is left out: without special tokens all it does is to move the offsets of tokens
        that begin or end in spaces, and then a lone newline has no place in the text any more.
        """
        from tokenizers import Tokenizer

        copy = Tokenizer.from_str(self.tokenizer.backend_tokenizer.to_str())
        copy.no_truncation()
        copy.no_padding()
        if copy.post_processor is not None:
            copy.post_processor = None
        copy.encode_special_tokens = bool(getattr(self.tokenizer, "split_special_tokens", False))
        return copy


class Encoded:
    """A text's ids, and which of them lie in a stretch of its characters."""

    ids: list[int]

    def tokens(self, start: int, end: int) -> tuple[int, int]:
        """Range of the tokens that hold any of the characters `start:end`.

        An added token that begins before `start` is not among them: it belongs to what stands before, and
        only took in the spaces behind it (`rstrip`).
        """
        raise NotImplementedError


class _FastEncoded(Encoded):
    def __init__(self, encoding: Any, added_ids: frozenset[int]) -> None:
        self.ids = encoding.ids
        self._added_ids = added_ids
        offsets = encoding.offsets
        self._starts = [start for start, _ in offsets]
        # A token without width (a `▁` that stands for no character) counts with what follows it.
        self._ends = [end if end > start else start + 1 for start, end in offsets]

    def tokens(self, start: int, end: int) -> tuple[int, int]:
        first = bisect_right(self._ends, start)
        last = bisect_left(self._starts, end)
        while first < last and self._starts[first] < start and self.ids[first] in self._added_ids:
            first += 1
        return first, max(first, last)


class _SlowEncoded(Encoded):
    """Positions by encoding the text's beginning alone: a token across the cut is the first that differs."""

    def __init__(self, encoder: TextEncoder, text: str) -> None:
        self._encoder = encoder
        self._text = text
        self.ids = encoder.beginnings([text])[0]

    def tokens(self, start: int, end: int) -> tuple[int, int]:
        first, _ = self._until(start)
        last, clean = self._until(end)
        last = last if clean else min(last + 1, len(self.ids))
        return first, max(first, last)

    def _until(self, position: int) -> tuple[int, bool]:
        """Number of tokens before a position, and whether a token begins exactly there."""
        before = self._encoder.beginnings([self._text[:position]])[0] if position else []
        same = 0
        for mine, full in zip(before, self.ids, strict=False):
            if mine != full:
                break
            same += 1
        return same, same == len(before)
