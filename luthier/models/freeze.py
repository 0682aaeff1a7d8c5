"""Which of the model's own parameters train when there is no adapter."""

from __future__ import annotations

import re

from torch import nn
from transformers import PreTrainedModel

from luthier.config import FreezeConfig
from luthier.errors import ConfigError, ModelError
from luthier.models.load import decoder_of


def set_trainable(model: PreTrainedModel, freeze: FreezeConfig) -> None:
    """Set `requires_grad` on every parameter as the section says; without settings everything trains.

    `train_last_n_layers` trains the last n decoder layers, the head and, unless `freeze_embeddings`, the
    embeddings: not the final norm. Parts of a multimodal model other than its text decoder stay frozen.

    Raises:
        ModelError: more layers than there are, a pattern that matches nothing, or embeddings frozen while
            they are the trained head.
        ConfigError: a pattern that is no regular expression, or one that names rows of a tensor.
    """
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is not None and head.weight is embeddings.weight
    decoder = decoder_of(model)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    if freeze.unfrozen_parameters:
        _unfreeze_patterns(model, freeze.unfrozen_parameters)
    elif freeze.train_last_n_layers is not None:
        layers = _layers(decoder)
        count = freeze.train_last_n_layers
        if count > len(layers):
            raise ModelError(f"train_last_n_layers: {count}, but the model has {len(layers)} layers")
        trained: list[nn.Module] = list(layers)[len(layers) - count :]
        trained += [head] if head is not None else []
        trained += [] if freeze.freeze_embeddings else [embeddings]
        for module in trained:
            _train(module)
    else:
        _train(decoder)
        if head is not None:
            _train(head)
    if freeze.freeze_embeddings:
        if tied and head.weight.requires_grad:
            raise ModelError(
                "freeze_embeddings: true, but this model's embeddings and head are one tensor (tie_word_embeddings), "
                "and the head is trained; drop freeze_embeddings, or train with an adapter"
            )
        embeddings.requires_grad_(False)
        if tied:
            head.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ModelError("no parameter would be trained with these settings")


def _train(module: nn.Module) -> None:
    for parameter in module.parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(True)


def _layers(decoder: nn.Module) -> nn.ModuleList:
    lists = [child for child in decoder.children() if isinstance(child, nn.ModuleList)]
    if len(lists) != 1:
        raise ModelError(
            f"train_last_n_layers: {type(decoder).__name__} does not keep its layers in one list; "
            "name the parameters by unfrozen_parameters instead"
        )
    return lists[0]


def _unfreeze_patterns(model: nn.Module, patterns: tuple[str, ...] | list[str]) -> None:
    names = [name for name, _ in model.named_parameters()]
    for text in patterns:
        if re.search(r"\[\d*:\d*\]$", text):
            raise ConfigError(
                f"unfrozen_parameters: {text!r} trains rows of a tensor; only whole parameters can be named"
            )
        try:
            pattern = re.compile(text)
        except re.error as error:
            raise ConfigError(f"unfrozen_parameters: {text!r} is no regular expression: {error}") from error
        matched = [name for name in names if pattern.match(name)]
        if not matched:
            raise ModelError(
                f"unfrozen_parameters: nothing matches {text!r}; parameters are called like {', '.join(names[:3])}"
            )
        for name in matched:
            model.get_parameter(name).requires_grad_(True)
