"""The tokenizer as GGUF metadata: tokens, their kinds, merges or scores, special ids, the chat template.

Nothing here is taken on trust: before a file is written, llama.cpp's way of reading the vocabulary is tried on many
texts beside the tokenizer itself, and other ids are an error.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from luthier.errors import ModelError
from luthier.export.gguf.pieces import Pieces, differing, is_byte, read_pieces
from luthier.export.gguf.pre_tokenizers import TEXTS, find_pre_tokenizer, sample

log = logging.getLogger("luthier")

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6


@dataclass(frozen=True)
class Vocabulary:
    """Attributes:
    model: llama.cpp's name of the kind, gpt2 or llama. pre: of the pre-tokenizer. tried: texts that gave the same ids.
    ends: ids at which generation stops, the tokenizer's EOS first.
    """

    model: str
    pre: str
    tokens: list[str]
    kinds: list[int]
    tried: int
    add_bos: bool
    add_eos: bool
    special: dict[str, int]
    ends: tuple[int, ...]
    template: str | None
    merges: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    prefix: bool = False

    def describe(self, writer: Any) -> None:
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        if self.scores:
            writer.add_token_scores(self.scores)
            writer.add_add_space_prefix(self.prefix)
        writer.add_token_types(self.kinds)
        if self.merges:
            writer.add_token_merges(self.merges)
        for name, number in self.special.items():
            getattr(writer, f"add_{name}_token_id")(number)
        if len(self.ends) > 1:
            writer.add_eot_token_id(self.ends[1])
        writer.add_add_bos_token(self.add_bos)
        writer.add_add_eos_token(self.add_eos)
        if self.template:
            writer.add_chat_template(self.template)


def read_vocabulary(
    tokenizer: PreTrainedTokenizerBase, rows: int, ends: Sequence[int], name: str
) -> Vocabulary:
    """A tokenizer as llama.cpp has it, tried out.

    Args:
        rows: of the embeddings; rows without a token get one that is never used. ends: ids that end an answer.

    Raises:
        ModelError: llama.cpp cannot have it, or it would give other ids.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ModelError(f"{name}: {type(tokenizer).__name__} has no tokenizer.json, from which a GGUF file is made")
    spec = json.loads(backend.to_str())
    if spec["model"]["type"] != "BPE":
        raise ModelError(
            f"{name}: a {spec['model']['type']} tokenizer cannot be exported to GGUF; BPE ones can (byte-level, or "
            "from SentencePiece)"
        )
    tokens, kinds = _tokens(spec, tokenizer, rows, name)
    add_bos, add_eos = _added_around(tokenizer, name)
    _warn_of_spaces(spec, name)
    special = {
        key: number
        for key in ("bos", "eos", "unk", "pad")
        if (number := getattr(tokenizer, f"{key}_token_id", None)) is not None
    }
    if special.get("eos") is None and ends:
        special["eos"] = ends[0]
    eos = [special["eos"]] if "eos" in special else []
    if eos and "bos" not in special:  # llama.cpp would take token 11 for it
        special["bos"] = eos[0]
    shared: dict[str, Any] = {
        "tokens": tokens,
        "kinds": kinds,
        "add_bos": add_bos,
        "add_eos": add_eos,
        "special": special,
        "ends": tuple(dict.fromkeys([*eos, *ends])),
        "template": template_of(tokenizer),
    }
    around = [f"one {token['content']}two {token['content']}\nthree" for token in spec.get("added_tokens") or []][:50]
    if _is_byte_level(spec):
        merges = [" ".join(merge) if isinstance(merge, list) else merge for merge in spec["model"]["merges"]]
        pre, tried = find_pre_tokenizer(spec, name, around)
        return Vocabulary("gpt2", pre.name, merges=merges, tried=tried, **shared)
    pieces = read_pieces(spec, name)
    tried = _try_pieces(pieces, tokenizer, [*around, *sample({"model": {"vocab": {}}})], name)
    scores = [float(pieces.scores.get(number, 0.0)) for number in range(rows)]
    return Vocabulary("llama", "default", scores=scores, prefix=pieces.prefix, tried=tried, **shared)


def template_of(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The chat template without its marks of what is trained, which only transformers knows."""
    found = tokenizer.chat_template
    if isinstance(found, dict):
        found = found.get("default")
    # A condition in the place of the mark, so that the white space around it goes the same way.
    opened = re.sub(r"\{%([-+]?)\s*generation\s*([-+]?)%\}", r"{%\1 if true \2%}", found or "")
    return re.sub(r"\{%([-+]?)\s*endgeneration\s*([-+]?)%\}", r"{%\1 endif \2%}", opened) or None


def _tokens(
    spec: dict[str, Any], tokenizer: PreTrainedTokenizerBase, rows: int, name: str
) -> tuple[list[str], list[int]]:
    tokens = [f"[PAD{number}]" for number in range(rows)]
    kinds = [UNUSED] * rows
    if len(tokenizer) > rows:
        raise ModelError(f"{name}: its tokenizer has {len(tokenizer)} tokens and its embeddings {rows} rows")
    pieces = not _is_byte_level(spec)
    for token, number in spec["model"]["vocab"].items():
        tokens[number], kinds[number] = token, NORMAL
        if pieces and is_byte(token):
            kinds[number] = BYTE
        elif pieces and number == tokenizer.unk_token_id:
            kinds[number] = UNKNOWN
    for added in spec.get("added_tokens") or []:
        number = int(added["id"])
        tokens[number] = added["content"]
        if kinds[number] != UNKNOWN:
            kinds[number] = CONTROL if added["special"] else USER_DEFINED
    return tokens, kinds


def _is_byte_level(spec: dict[str, Any]) -> bool:
    text = json.dumps([spec.get("pre_tokenizer"), spec.get("decoder")])
    return '"ByteLevel"' in text


def _added_around(tokenizer: PreTrainedTokenizerBase, name: str) -> tuple[bool, bool]:
    """Whether the tokenizer puts BOS before a text, and EOS behind it."""
    bare = list(tokenizer("a b", add_special_tokens=False)["input_ids"])
    whole = list(tokenizer("a b")["input_ids"])
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    for before in (False, True):
        for behind in (False, True):
            if whole == [*([bos] if before else []), *bare, *([eos] if behind else [])]:
                return before, behind
    raise ModelError(f"{name}: its tokenizer adds more than BOS and EOS to a text, and llama.cpp has no place for that")


def _warn_of_spaces(spec: dict[str, Any], name: str) -> None:
    takes = [
        token["content"]
        for token in spec.get("added_tokens") or []
        if token["lstrip"] or token["rstrip"] or token["single_word"]
    ]
    if takes:
        log.warning(
            "%s: the tokenizer takes spaces beside %s away, which llama.cpp does for models that are called Phi-3 "
            "only: leave none there",
            name,
            ", ".join(takes[:4]) + (", ..." if len(takes) > 4 else ""),
        )


def _try_pieces(pieces: Pieces, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], name: str) -> int:
    texts = [*dict.fromkeys([*texts, *TEXTS])]
    expected = [list(ids) for ids in tokenizer(list(texts), add_special_tokens=False)["input_ids"]]
    known, other = differing(pieces, texts, expected)
    if other:
        shortest = min(other, key=len)
        raise ModelError(
            f"{name}: llama.cpp would read {len(other)} of {len(texts)} texts as other tokens, such as {shortest!r}: "
            "its tokenizer is not from SentencePiece"
        )
    if known:
        log.warning(
            "%s: llama.cpp puts a space behind each special token and before a text that begins with one; the "
            "tokenizer does not, so such texts become other tokens there (%d of %d that were tried)",
            name,
            len(known),
            len(texts),
        )
    return len(texts) - len(known)
