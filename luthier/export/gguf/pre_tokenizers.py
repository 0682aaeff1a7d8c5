"""Which of llama.cpp's ways of cutting text into words a tokenizer has.

A GGUF file does not hold the expression by which a byte-level BPE tokenizer cuts text before it merges; it holds a
name, and llama.cpp has the expressions of the names it knows. Which name is right is found by trying: the tokenizer is
built once more around each expression, and has to give the same ids for many texts.
"""

from __future__ import annotations

import copy
import itertools
import json
import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

from luthier.errors import ModelError

log = logging.getLogger("luthier")

_CONTRACTIONS = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"


def _cased(upper: str, lower: str, behind: str, digits: str) -> str:
    """Words that begin a new one where lower case goes over into upper case."""
    before = r"[^\r\n\p{L}\p{N}]?"
    return (
        f"{before}{upper}*{lower}+{behind}|{before}{upper}+{lower}*{behind}"
        rf"|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


# llama.cpp takes letters of other alphabets for both cases.
_NOT_LOWER, _NOT_UPPER = r"((?=[\p{L}])([^a-z]))", r"((?=[\p{L}])([^A-Z]))"


@dataclass(frozen=True)
class PreTokenizer:
    """One of llama.cpp's: expressions, each applied to the pieces of the one before.

    `whole_words`: a word that is in the vocabulary is a token, whether or not merges lead to it. `stands_for`: what the
    tokenizers have that llama.cpp means by it, where it is not the same.
    """

    name: str
    expressions: tuple[str, ...]
    whole_words: bool = False
    stands_for: str = ""


# Those of models that are fine-tuned; others with the same expression give the same ids.
KNOWN = (
    PreTokenizer("llama-bpe", (rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_TAIL}",), True),
    PreTokenizer("qwen2", (rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_TAIL}",)),
    PreTokenizer("gpt-2", (_GPT2,)),
    PreTokenizer("smollm", (r"\p{N}", _GPT2)),
    PreTokenizer("smaug-bpe", (rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_TAIL}",)),
    PreTokenizer(
        "tekken",
        (_cased(_NOT_LOWER, _NOT_UPPER, "", r"\p{N}"),),
        True,
        stands_for=_cased(_UPPER, _LOWER, "", r"\p{N}"),
    ),
    PreTokenizer(
        "gpt-4o",
        (_cased(_NOT_LOWER, _NOT_UPPER, f"{_CONTRACTIONS}?", r"\p{N}{1,3}"),),
        stands_for=_cased(_UPPER, _LOWER, "(?i:'s|'t|'re|'ve|'m|'ll|'d)?", r"\p{N}{1,3}"),
    ),
)

TEXTS = (
    "The quick brown fox jumps over the lazy dog, and then it sits down to rest.",
    "### Instruction:\nName three primary colours.\n\n### Response:\nRed, yellow and blue.",
    "def add(a, b):\n    return a + b\n\n\tprint(add(2, 3))  # five\n",
    "We'll see, they've said it's HIS; I'D rather not, don't you? O'Neill's",
    "1 22 333 4444 55555 1234567890 3.14159 1,000,000 12:30 2026-11-21",
    "  two spaces,   three,\ttab, \n newline,\n\n\nthree \r\n and the other kind\r\n\r\n",
    "trailing space ",
    " leading space",
    "\n\nleading newlines",
    "naïve café, Grüße aus Österreich, Ærøskøbing, İstanbul",
    "日本語の文章と中文的句子，한국어 문장도 있습니다。",
    "Привет, мир! Γειά σου Κόσμε. שלום עולם مرحبا بالعالم ١٢٣ नमस्ते दुनिया १२३ สวัสดี",
    "🙂😀🚀👩‍👩‍👧‍👦🏳️‍🌈 €£¥ ½ ² ∑∫√ “quoted” — dash… ｆｕｌｌｗｉｄｔｈ",
    "https://example.org/a_path?b=c&d=%20#e user@example.org C:\\Users\\x /usr/bin",
    "{\"a\": [1, 2.5e-3, null], 'b': \"c\\n\"} <tag attr='x'>&amp;</tag> [[{{((!?))}}]]",
    "camelCase PascalCase snake_case SCREAMING_CASE kebab-case x86_64 iPhone15Pro",
    "\u00a0no-break\u2003em\u200bzero\u3000wide",
    "a",
    " ",
    "\n",
)
_KINDS = (
    "a", "B", "é", "字", "1", "٣", " ", "  ", "\n", "\r\n", "\t", ".", "'s", "'", "!", "_", "🙂", "\u00a0", "\u0301"
)  # fmt: skip


def sample(spec: dict[str, Any]) -> list[str]:
    """Texts on which tokenizers of different kinds differ: every short row of kinds of characters, longer ones at
    random, and what the vocabulary itself has in it."""
    short = ["".join(row) for length in (1, 2, 3) for row in itertools.product(_KINDS, repeat=length)]
    draw = random.Random(0)
    long = ["".join(draw.choices(_KINDS, k=12)) for _ in range(2000)]
    letters = _byte_letters()
    own = []
    for token in list(spec["model"]["vocab"])[:20_000]:
        with_bytes = bytes(letters.index(c) for c in token) if all(c in _KNOWN_LETTERS for c in token) else b""
        text = with_bytes.decode("utf-8", errors="ignore")
        if text:
            own.append(text)
    return [*TEXTS, *short, *long, *own]


def _byte_letters() -> list[str]:
    """The letter by which byte-level vocabularies write each byte: printable ones themselves, the rest from 256 up."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    further = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(further)) for byte in range(256)]


_KNOWN_LETTERS = frozenset(_byte_letters())


def find_pre_tokenizer(spec: dict[str, Any], name: str, texts: Sequence[str]) -> tuple[PreTokenizer, int]:
    """llama.cpp's pre-tokenizer for a tokenizer, and the number of texts on which both gave the same ids.

    Args:
        spec: `tokenizer.json`. texts: further ones to compare.

    Raises:
        ModelError: none of those that are known.
    """
    normalises = _normaliser(spec, name)
    ours = Tokenizer.from_str(json.dumps(spec))
    every = [*dict.fromkeys([*texts, *sample(spec)])]
    if normalises:
        every = [text for text in every if ours.normalizer.normalize_str(text) == text]
    expected = _ids(ours, every)
    pieces = [ours.pre_tokenizer.pre_tokenize_str(text) for text in every]
    second: tuple[int, PreTokenizer] | None = None
    nearest: tuple[int, str, str] | None = None
    for one in KNOWN:
        theirs = _rebuilt(spec, one)
        found = _ids(theirs, every)
        differing = [text for text, x, y in zip(every, expected, found, strict=True) if x != y]
        if differing and one.stands_for and one.stands_for in _expressions(spec):
            log.warning(
                "%s: llama.cpp's %s is meant for this tokenizer and reads %d of %d texts otherwise, such as %r",
                name,
                one.name,
                len(differing),
                len(every),
                min(differing, key=len),
            )
            return one, len(every) - len(differing)
        if differing:
            if nearest is None or len(differing) < nearest[0]:
                nearest = (len(differing), one.name, min(differing, key=len))
            continue
        cut = [theirs.pre_tokenizer.pre_tokenize_str(text) for text in every]
        if cut == pieces:
            return one, len(every)
        alike = sum(x == y for x, y in zip(cut, pieces, strict=True))
        if second is None or alike > second[0]:
            second = alike, one
    if second is not None:
        log.info(
            "the tokenizer cuts %d of %d texts into words as %s does, and the others into words that have the same "
            "token ids",
            second[0],
            len(every),
            second[1].name,
        )
        return second[1], len(every)
    assert nearest is not None
    raise ModelError(
        f"{name}: llama.cpp has no pre-tokenizer like this tokenizer's, so texts would become other tokens there "
        f"(nearest is {nearest[1]}, which differs on {nearest[0]} of {len(every)} texts, such as {nearest[2]!r})"
    )


def _expressions(spec: dict[str, Any]) -> list[str]:
    found = spec.get("pre_tokenizer") or {}
    parts = found.get("pretokenizers") or [found]
    return [part["pattern"].get("Regex", "") for part in parts if part.get("type") == "Split"]


def _normaliser(spec: dict[str, Any], name: str) -> bool:
    kind = (spec.get("normalizer") or {}).get("type")
    if kind not in (None, "NFC"):
        raise ModelError(f"{name}: its tokenizer changes texts before it cuts them ({kind}), and llama.cpp does not")
    if kind:
        log.info("the tokenizer composes accents first (NFC) and llama.cpp does not: texts in NFC give the same ids")
    return kind is not None


def _ids(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    return [one.ids for one in tokenizer.encode_batch(list(texts), add_special_tokens=False)]


def _rebuilt(spec: dict[str, Any], one: PreTokenizer) -> Tokenizer:
    theirs = copy.copy(spec)
    theirs["normalizer"] = None
    theirs["post_processor"] = None
    theirs["model"] = {**spec["model"], "ignore_merges": one.whole_words}
    cuts = [
        {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False}
        for expression in one.expressions
    ]
    to_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    theirs["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [*cuts, to_bytes]}
    return Tokenizer.from_str(json.dumps(theirs))
