"""Figures that others have published, where their settings are known; docs/plan.md has them as a table.

Lit-GPT on an A100 with Llama-2-7B and Alpaca computes in bf16 throughout (adapters, gradients and Adam's moments too),
pads to the longest row of a micro batch of one (1,304 tokens), and keeps all logits. What it keeps of a layer follows
from its modules under plain autograd; `litgpt` below adds that up. Our own engine keeps less, so its plan is smaller.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from luthier.config import AdapterConfig, Config
from luthier.plan.cards import card_named
from luthier.plan.engine import Engine, Pass
from luthier.plan.families import sizes
from luthier.plan.memory import Memory, largest, memory_of, rule_of_thumb
from luthier.plan.read import adapter_shape
from luthier.plan.shape import Shape

GB = 1e9
LLAMA_2_7B = sizes("llama-2")["7B"]
CONFIG = Config.from_flat({"base_model": "x", "datasets": [{"path": "x", "type": "completion"}]})
QUERY_VALUE = ["q_proj", "v_proj"]
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]
ROW = 1304


def shape(r: int, targets: list[str], described: Any = LLAMA_2_7B) -> Shape:
    return adapter_shape(CONFIG, described, AdapterConfig(adapter="lora", lora_r=r, lora_target_modules=targets))


def litgpt(model: Shape, tokens: int, *, quantised: bool, adam: bool) -> float:
    """Bytes of Lit-GPT's step: everything in 16 bits, a padded row, full logits."""
    D, inner, layers = model.hidden, 11008, len(model.layers)
    weights = 2 * (model.total - model.adapters)
    if quantised:  # NF4 with fp32 scales
        weights -= (2 - 0.5 - 4 / 64) * model.linear
    trained = (2 + 2 + (4 if adam else 0)) * model.trainable  # itself, gradient, two moments
    norms = 2 * 4 * D  # the input and its normalised self, both in fp32: twice the width in 16 bits
    attention = 6 * D  # queries, keys, values, output and its copy, and the projections' input
    dropped = 1.5 * D  # what dropout leaves of that input, and its mask
    mlp = D + 4 * inner  # input, gate, activation, up, product
    logits = model.vocabulary * (2 + 4 + 4)  # in 16 bits, in fp32, and their gradient
    return weights + trained + tokens * (2 * layers * (norms + attention + dropped + mlp) + logits)


def test_trainable_parameters_are_the_published_ones() -> None:
    assert shape(8, QUERY_VALUE).trainable == 4_194_304
    assert shape(8, ALL).trainable == 20_277_248  # with the head, and 19,988,480 without it


@pytest.mark.parametrize(
    ("r", "targets", "quantised", "published"),
    [(8, QUERY_VALUE, False, 21.3), (8, QUERY_VALUE, True, 14.2), (256, ALL, True, 17.9)],
)
def test_litgpt_within_a_tenth(r: int, targets: list[str], quantised: bool, published: float) -> None:
    found = litgpt(shape(r, targets), ROW, quantised=quantised, adam=True)
    assert found / GB == pytest.approx(published, rel=0.1)


def test_longer_rows_of_litgpt() -> None:
    """Published: 27.0 GB at 2,048 tokens. From 1,304 on that grows by 12 MB a token, where what layers keep comes to
    7: another setting differs as well, or the allocator's blocks do. The figure is met within a tenth all the same."""
    found = litgpt(shape(256, ALL), 2048, quantised=True, adam=True)
    assert found / GB == pytest.approx(27.0, rel=0.1)


def test_adam_against_sgd() -> None:
    """Published: 0.03 GB at r=8, 3.4 GB at r=256. Two moments of the same parameters are 2.6 GB in 16 bits and 5.2 GB
    in fp32, which ours are; the published figure lies between."""

    def of(name: str, model: Shape) -> float:
        one = Pass(ROW, ROW, ROW, ROW**2, several=True)
        return memory_of(model, Engine(quantised="4bit", optimizer=name), one).total / GB

    small, large = shape(8, QUERY_VALUE), shape(256, ALL)
    assert of("adamw_torch_fused", small) - of("sgd", small) == pytest.approx(0.03, abs=0.005)
    fp32 = of("adamw_torch_fused", large) - of("sgd", large)
    bf16 = litgpt(large, ROW, quantised=True, adam=True) - litgpt(large, ROW, quantised=True, adam=False)
    assert fp32 == pytest.approx(2 * bf16 / GB, rel=1e-6)
    assert bf16 / GB < 3.4 < fp32


def test_ours_needs_less_than_what_is_published() -> None:
    one = Pass(ROW, ROW, ROW, ROW**2, several=True)
    lora, qlora = (
        memory_of(shape(8, QUERY_VALUE), Engine(quantised=quantised), one).total / GB for quantised in (None, "4bit")
    )
    assert lora < 21.3 and qlora < 14.2
    assert 1 - qlora / lora > 0.33  # published: 33% saved


def test_rule_of_thumb_is_what_full_fine_tuning_in_fp32_comes_to() -> None:
    from luthier.config import FreezeConfig
    from luthier.plan.read import full_shape

    model = full_shape(CONFIG, LLAMA_2_7B, FreezeConfig())
    found = memory_of(model, Engine(compute=4, frozen=4, slices=True), Pass(128, 128, 128, 128**2)).total
    assert found == pytest.approx(rule_of_thumb(model.total), rel=0.05)


# --- what the project promises ------------------------------------------------------------------------------


def fits(found: Memory, name: str) -> bool:
    return found.total <= card_named(name).room


def test_qlora_of_7b_on_alpaca_is_under_8_gb() -> None:
    """r=8, batches of 2 x 4, where a pass has to hold the longest row of Alpaca."""
    model = shape(8, ALL[:-1])
    engine = Engine(quantised="4bit", recompute="layer")
    assert memory_of(model, engine, Pass(ROW, ROW, ROW, ROW**2, several=True)).total < 8 * GB
    # Rows cut at 512 tokens, as is usual, need no recomputation.
    short = Pass(512, 512, 512, 512**2, several=True)
    assert memory_of(model, replace(engine, recompute="keep"), short).total < 8 * GB


def test_8b_at_24_gb_has_more_than_80k_tokens() -> None:
    model = shape(8, ALL[:-1], sizes("llama-3")["8B"])
    engine = Engine(quantised="4bit", recompute="offload")
    room = 24 * GB - card_named("rtx4090").memory + card_named("rtx4090").room
    assert largest(lambda n: memory_of(model, engine, Pass(n, n, n, n**2)).total <= room) > 80_000
    assert fits(memory_of(model, engine, Pass(80_000, 80_000, 80_000, 80_000**2)), "rtx4090")
