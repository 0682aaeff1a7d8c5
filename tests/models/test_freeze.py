"""Which parameters train without an adapter."""

from __future__ import annotations

import pytest

from luthier.config import FreezeConfig
from luthier.errors import ConfigError, ModelError
from luthier.models.freeze import set_trainable
from tests.models.families import toy_model


def _trained(**values: object) -> set[str]:
    tied = bool(values.pop("tied", False))
    model = toy_model("llama", tie_word_embeddings=tied)
    set_trainable(model, FreezeConfig(**values))
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_everything_trains_by_default() -> None:
    model = toy_model("llama")
    assert _trained() == {name for name, _ in model.named_parameters()}


def test_last_layers_and_head() -> None:
    last = {name for name, _ in toy_model("llama").named_parameters() if ".layers.1." in name}
    assert _trained(train_last_n_layers=1, freeze_embeddings=True) == last | {"lm_head.weight"}
    assert _trained(train_last_n_layers=1) == last | {"lm_head.weight", "model.embed_tokens.weight"}
    assert _trained(train_last_n_layers=0, freeze_embeddings=True) == {"lm_head.weight"}
    assert "model.embed_tokens.weight" not in _trained(freeze_embeddings=True)


def test_patterns() -> None:
    assert _trained(unfrozen_parameters=[r"^lm_head.weight$", r"model.layers.1.mlp"]) == {
        "lm_head.weight",
        *(f"model.layers.1.mlp.{name}_proj.weight" for name in ("gate", "up", "down")),
    }


@pytest.mark.parametrize(
    ("values", "error", "says"),
    [
        ({"train_last_n_layers": 1, "freeze_embeddings": True, "tied": True}, ModelError, "one tensor"),
        ({"freeze_embeddings": True, "tied": True}, ModelError, "one tensor"),
        ({"train_last_n_layers": 3}, ModelError, "has 2 layers"),
        ({"unfrozen_parameters": ["nothing"]}, ModelError, "nothing matches"),
        ({"unfrozen_parameters": ["("]}, ConfigError, "regular expression"),
        ({"unfrozen_parameters": ["model.embed_tokens.weight$[:100]"]}, ConfigError, "rows of a tensor"),
    ],
)
def test_what_cannot_be_is_said(values, error, says) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=says):
        _trained(**values)
