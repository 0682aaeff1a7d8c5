"""`luthier export --to gguf` from beginning to end: everything is checked, then written, then compared."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from luthier.config import Config
from luthier.data.tokenizer import terminator_ids
from luthier.errors import ConfigError, ModelError, RunError
from luthier.export import folder as folders
from luthier.export.gguf import families, llama, proof, quants, write
from luthier.export.gguf.quants import Quant
from luthier.export.gguf.vocabulary import read_vocabulary
from luthier.export.merge import CannotStreamError, plan_merge
from luthier.export.modelfile import modelfile
from luthier.export.opened import Opened, own_dtype
from luthier.export.quantised import stored_bits
from luthier.export.room import claim_room, in_words
from luthier.export.run import say_plan

log = logging.getLogger("luthier")

MODELFILE = "Modelfile"


def export_gguf(
    opened: Opened, run: Config | None, quant: Quant, target: Path, *, overwrite: bool, check: bool
) -> None:
    """Write `target`, and a Modelfile beside it.

    Args:
        run: of the training, if one is known.

    Raises:
        LuthierError: something does not fit; what was there before is still there then.
    """
    beside = _beside(target)
    _check_target(target, beside, overwrite=overwrite)
    quants.check_installed(quant)
    document, ends = describe(opened, run)
    log.info(
        "%s: %s, %s tokenizer (%s); its token ids are the same in llama.cpp for %d texts",
        document.name,
        document.family.arch,
        document.vocabulary.model,
        document.vocabulary.pre,
        document.vocabulary.tried,
    )
    first = quants.QUANTS[_before(opened)] if quant.by_llama_cpp else quant
    size, besides = document.size(first), ""
    if quant.by_llama_cpp:
        size += document.size(quant)
        besides = f"of that {in_words(document.size(first))} for the file in {first.name} that llama.cpp starts from"
    claim_room(size, target, besides=besides, smaller="" if quant.name == "q4_0" else "take a smaller --quant")
    tokenizer = opened.tokens.tokenizer
    assert tokenizer is not None
    text = modelfile(target.name, tokenizer, run, ends, adds_bos=document.vocabulary.add_bos)
    with _in_place(target) as partial:
        if quant.by_llama_cpp:
            between = target.with_name(f".partial-{first.name}-{target.name}")
            try:
                write.write(document, first, between)
                llama.quantise(between, partial, quant.kind)
            finally:
                with suppress(FileNotFoundError):
                    between.unlink()
        else:
            write.write(document, quant, partial)
        size = partial.stat().st_size
    with _in_place(beside) as partial:
        partial.write_text(text, encoding="utf-8")
    log.info("%d tensors written, %s", len(document.entries), in_words(size))
    if check:
        proof.compare(opened, run, target, quant)
    log.info("the model is in %s, and a %s for Ollama beside it", target, beside.name)


def describe(opened: Opened, run: Config | None) -> tuple[write.Document, list[str]]:
    """Everything that a file will hold, checked, and the tokens at which answers end."""
    base = opened.base
    config = write.text_config(base)
    family = families.family_of(config, base.name)
    families.check(config, family, base.name)
    tokenizer = opened.tokens.tokenizer
    if tokenizer is None:
        raise ModelError(f"{base.name}: there is no tokenizer, and a GGUF file holds one")
    try:
        plan = plan_merge(base, opened.adapter, torch.float32)
    except CannotStreamError as error:
        raise ModelError(f"{base.name}: {error}; merge it first, with luthier export --to merged") from error
    opened.say_weights()
    say_plan(plan, base)
    ends = _ends(opened, run)
    document = write.Document(
        name=base.name,
        config=config,
        family=family,
        vocabulary=read_vocabulary(tokenizer, plan.rows, ends, base.name),
        entries=write.list_tensors(base, plan, config, family),
        rows=plan.rows,
        about=_about(opened, family, tokenizer.get_vocab()),
    )
    return document, [token for end in ends if isinstance(token := tokenizer.convert_ids_to_tokens(end), str)]


def _ends(opened: Opened, run: Config | None) -> list[int]:
    """The tokenizer's EOS, where training taught the model to end, and what the base says."""
    tokenizer = opened.tokens.tokenizer
    assert tokenizer is not None
    found = [tokenizer.eos_token_id]
    if run is not None:
        found += terminator_ids(tokenizer, run)
    if (opened.source / "generation_config.json").is_file():
        named = folders.read_json(opened.source / "generation_config.json").get("eos_token_id")
        found += named if isinstance(named, list) else [named]
    return list(dict.fromkeys(end for end in found if isinstance(end, int)))


def _about(opened: Opened, family: families.Family, vocab: Mapping[str, int]) -> dict[str, Any]:
    base = Path(opened.base.name).name
    own = [folder.resolve().name for folder in opened.job.folders]
    name = f"{' + '.join(own)} ({base})" if own else base
    # By this name llama.cpp knows that spaces behind special tokens are dropped, and it wants these tokens then.
    is_called = re.search("phi-?3", name, re.IGNORECASE) is not None
    is_one = {"<s>", "</s>", "<unk>", "<|endoftext|>"} <= vocab.keys()
    if is_called and not is_one:
        name = re.sub("(phi)-?3", r"\1_3", name, flags=re.IGNORECASE)
    elif is_one and family.arch == "phi3" and not is_called:
        name += " (Phi-3)"
    about: dict[str, Any] = {"name": name}
    card = opened.source / "README.md"
    if card.is_file():
        found = re.match(r"---\n.*?^license:\s*([^\n]+)$.*?^---", card.read_text(encoding="utf-8"), re.S | re.M)
        if found:
            about["license"] = found[1].strip().strip("\"'")
    return about


def _before(opened: Opened) -> str:
    """The format in 16 bits that llama.cpp quantises from: the base's own, if it is one."""
    if stored_bits(opened.base.checkpoint) is None and own_dtype(opened.base.checkpoint) == torch.float16:
        return "f16"
    return "bf16"


def _beside(target: Path) -> Path:
    """The Modelfile's place: one that is there and names another file keeps its own."""
    beside = target.with_name(MODELFILE)
    if beside.is_file() and f"FROM ./{target.name}\n" not in beside.read_text(encoding="utf-8", errors="replace"):
        return target.with_name(f"{MODELFILE}-{target.stem}")
    return beside


def _check_target(target: Path, beside: Path, *, overwrite: bool) -> None:
    for path in (target, beside):
        if path.is_dir():
            raise ConfigError(f"--output: {path} is a folder")
        if path.exists() and not overwrite:
            raise ConfigError(
                f"--output: {path} is there already, and nothing is overwritten unasked. Choose another place, or add "
                "--overwrite"
            )


@contextmanager
def _in_place(target: Path) -> Iterator[Path]:
    """Another name to write under, which becomes `target` once all is well, and is gone if it is not."""
    partial = target.with_name(f".partial-{target.name}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        os.replace(partial, target)
    except OSError as error:
        raise RunError(f"{target} cannot be written: {error.strerror or error}") from error
    finally:
        with suppress(FileNotFoundError):
            partial.unlink()
