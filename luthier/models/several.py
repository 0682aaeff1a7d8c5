"""Several adapters on one base: the base is loaded once, nothing is merged, and each text has the adapter it asks for.

What is opened here is checked before anything is loaded: one base, the same tokens, adapters that add to linear layers
and do nothing else. How a pass is computed is in `models.speakers`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from luthier.config import Config
from luthier.errors import ConfigError, ModelError
from luthier.models import adapter_files, quantize
from luthier.models.assemble import Found, find, load_base, make_ready, open_for_inference, tokenizer_of
from luthier.models.load import embeddings_of
from luthier.models.lora import lora_layers
from luthier.models.speakers import APART, SeveralLinear, Speakers
from luthier.models.targets import find_targets

log = logging.getLogger("luthier")

# What a base is loaded with. Two runs that say otherwise have no base in common.
_OF_BASE = (
    "revision",
    "model_type",
    "trust_remote_code",
    "attn_implementation",
    "bf16",
    "fp16",
    "tf32",
    "rope_parameters",
    "load_in_4bit",
    "load_in_8bit",
    "bnb_4bit_quant_type",
    "bnb_4bit_use_double_quant",
)


@dataclass(frozen=True)
class Target:
    """What goes by a name: `adapter` is what its texts' rows ask for (None: the model as it is loaded)."""

    name: str
    path: str
    adapter: str | None
    tokenizer: PreTrainedTokenizerBase
    run: Config | None


class Several:
    """A model that answers by several names.

    Attributes:
        targets: by name, in the order in which they were given. speakers: None where the model is one target's alone.
    """

    def __init__(self, model: PreTrainedModel, targets: Sequence[Target], speakers: Speakers | None) -> None:
        self.model = model
        self.targets = {target.name: target for target in targets}
        self.speakers = speakers

    @property
    def names(self) -> list[str]:
        return list(self.targets)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The first one's: all have the same tokens, and each may have a chat template of its own."""
        return next(iter(self.targets.values())).tokenizer

    def tokenizer_of(self, name: str) -> PreTrainedTokenizerBase:
        return self.targets[name].tokenizer

    def run_of(self, name: str) -> Config | None:
        """The config of the run behind a name; None for an adapter or a model that no run has left."""
        return self.targets[name].run

    def adapter_of(self, name: str) -> str | None:
        """What a `Row` of this name has as its `adapter`."""
        return self.targets[name].adapter

    def loop(self, engine: Any) -> Any:
        """An engine's loop on this model, in which each row has the adapter that it asks for."""
        return engine.loop(self.speakers)


def open_several(
    paths: Sequence[str],
    *,
    names: Sequence[str] = (),
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> Several:
    """Runs, adapters and models to answer by name: one alone as `open_for_inference` opens it, several adapters, with
    or without their base, on one base that is loaded once.

    Args:
        names: in the order of the paths; none: those of the folders.

    Raises:
        ConfigError: two of one name, or names that are not one for each. ModelError: nothing loadable there, different
            bases or tokens, or an adapter that changes more than linear layers.
    """
    called = _named(paths, names)
    if len(paths) == 1:
        model, tokenizer, run = open_for_inference(paths[0], device=device, dtype=dtype)
        return Several(model, [Target(called[0], paths[0], None, tokenizer, run)], None)
    found = [find(path) for path in paths]
    _check_bases(paths, found)
    adapted = [at for at, one in enumerate(found) if one.is_adapter]
    settings = {at: _linear_only(paths[at], found[at]) for at in adapted}
    tokenizers = [tokenizer_of(one) for one in found]
    _check_tokens(paths, tokenizers)
    first = found[adapted[0]]
    model = load_base(first.loading, tokenizers[adapted[0]], device, dtype)
    embeddings = embeddings_of(model).weight
    if embeddings.shape[0] < len(tokenizers[0]):
        raise ModelError(f"{first.base} has no room for the tokens of {paths[0]}'s tokenizer; {APART}")
    speakers = Speakers(embeddings.device)
    _put_on(model, speakers, {called[at]: settings[at] for at in adapted})
    if quantize.is_quantized(model):
        quantize.take_over(model)
        if len(adapted) < len(found):
            log.info("the base answers as the adapters were trained on it: quantised")
    make_ready(model)
    count = len(adapted)
    log.info("%d adapter%s on one base, %s, none of them merged", count, "s"[: count != 1], first.base)
    return Several(
        model,
        [
            Target(name, path, name if one.is_adapter else None, tokenizer, one.run)
            for name, path, one, tokenizer in zip(called, paths, found, tokenizers, strict=True)
        ],
        speakers,
    )


def _named(paths: Sequence[str], names: Sequence[str]) -> list[str]:
    if names and len(names) != len(paths):
        counted = f"{len(names)} name{'s'[: len(names) != 1]} for {len(paths)} model{'s'[: len(paths) != 1]}"
        raise ConfigError(f"{counted}: name all of them, in their order, or none")
    if any(not name.strip() for name in names):
        raise ConfigError("a name is empty: clients ask for a model by its name (--name)")
    called = list(names) or [name_of(path) for path in paths]
    twice = next((name for name in called if called.count(name) > 1), None)
    if twice is not None:
        each = "give each a name of its own" if names else "name them all, in their order (--name ... --name ...)"
        raise ConfigError(f"two models are called {twice!r}: {each}")
    return called


def name_of(path: str) -> str:
    """What a model is called: its folder, with the run's where the folder is a part of one, or its name on the hub."""
    folder = Path(path).expanduser()
    if not folder.exists():
        return path
    folder = folder.resolve()
    of_run = folder.name.startswith("checkpoint-") or folder.name in ("merged", "merged-4bit")
    return f"{folder.parent.name}/{folder.name}" if of_run else folder.name


def _check_bases(paths: Sequence[str], found: Sequence[Found]) -> None:
    adapted = [(path, one) for path, one in zip(paths, found, strict=True) if one.is_adapter]
    if not adapted:
        raise ModelError(
            f"{', '.join(paths)} are whole models, and one process holds one base: start one server for each"
        )
    first_path, first = adapted[0]
    for path, one in zip(paths, found, strict=True):
        if _resolved(one.base) != _resolved(first.base):
            what = f"is on {one.base}" if one.is_adapter else "is a model by itself"
            if one.folder is None:
                what = "is no folder here, and no adapter on the hub that could be fetched"
            mend = "check the path, or " if one.folder is None else ""
            raise ModelError(f"{first_path} is on {first.base}, and {path} {what}: {mend}{APART}")
        own, other = one.loading.flat(), first.loading.flat()
        differing = [key for key in _OF_BASE if own.get(key) != other.get(key)] if one.is_adapter else []
        if differing:
            key = differing[0]
            raise ModelError(
                f"{first_path} and {path} were trained on one base that they load otherwise ({key}: {other.get(key)} "
                f"and {own.get(key)}): {APART}"
            )


def _resolved(base: str) -> str:
    folder = Path(base).expanduser()
    return str(folder.resolve()) if folder.exists() else base


def _linear_only(path: str, found: Found) -> Any:
    """The settings of an adapter that changes linear layers and nothing else."""
    settings = adapter_files.adapter_settings(str(found.folder))
    why = None
    if settings.peft_use_dora:
        why = "it is a DoRA adapter, which rescales the base's own output"
    elif settings.lora_modules_to_save:
        why = f"it has whole modules of its own ({', '.join(settings.lora_modules_to_save)})"
    elif settings.lora_target_parameters:
        why = "it is on experts, which are no linear layers"
    if why:
        raise ModelError(f"{path} cannot share its base with another adapter: {why}; {APART}")
    return settings


def _check_tokens(paths: Sequence[str], tokenizers: Sequence[PreTrainedTokenizerBase]) -> None:
    """Texts of all of them are made of the same tokens; chat templates may differ."""
    first = tokenizers[0]
    for path, tokenizer in zip(paths[1:], tokenizers[1:], strict=True):
        if tokenizer.get_vocab() != first.get_vocab():
            new = sorted(set(tokenizer.get_vocab()) ^ set(first.get_vocab()))
            what = f" ({', '.join(new[:3])})" if new else ""
            raise ModelError(f"the tokenizers of {paths[0]} and {path} have different tokens{what}: {APART}")


@torch.no_grad()
def _put_on(model: PreTrainedModel, speakers: Speakers, adapters: dict[str, Any]) -> None:
    """Read each adapter onto the base, as if it were alone, take its A and B, and give the base its layers back."""
    before = dict(model.named_modules())
    added: dict[str, dict[str, tuple[torch.Tensor, torch.Tensor]]] = {}
    dtype = embeddings_of(model).weight.dtype
    for name, settings in adapters.items():
        _check_targets(model, name, settings)
        adapter_files.load_adapter(model, settings.lora_model_dir, settings)
        for path, layer in lora_layers(model).items():
            a, b = layer.lora_A.t(), layer.lora_B.t() * layer.scale
            added.setdefault(path, {})[name] = a.to(dtype).contiguous(), b.to(dtype).contiguous()
            model.set_submodule(path, before[path])
    for path, of_layer in added.items():
        model.set_submodule(path, SeveralLinear(before[path], speakers, of_layer).train(before[path].training))


def _check_targets(model: PreTrainedModel, name: str, settings: Any) -> None:
    """Before anything of the base is written to: an adapter on embeddings, or a file with weights of the base that
    are others than it has."""
    for path in find_targets(model, settings):
        if isinstance(model.get_submodule(path), nn.Embedding):
            raise ModelError(
                f"{name} cannot share its base with another adapter: it adapts embeddings ({path}); {APART}"
            )
    tensors = adapter_files.read_adapter_tensors(settings.lora_model_dir)
    resized = adapter_files.resized_embeddings(model, tensors)
    for key, tensor in tensors.items():
        path, found, _ = key.removeprefix(adapter_files.PREFIX).partition(".base_layer.weight")
        if key in resized:
            path, found = path.removesuffix(".weight"), "whole"
        if found and not torch.equal(tensor, model.get_parameter(f"{path}.weight").to(tensor.dtype).cpu()):
            raise ModelError(f"{name} brings a weight of the base that is another than the base's ({path}); {APART}")
