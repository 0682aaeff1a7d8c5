"""The plan itself: a model, its work and a card put together, as plain data that text and JSON are made from."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from luthier.config import AdapterConfig, Config, FreezeConfig
from luthier.models.attention import REMEMBERED_FLOATS
from luthier.models.memory import CPU_TOKENS, FULL_SPEED_ELSEWHERE, FULL_SPEED_TOKENS
from luthier.models.recompute import MODES, Mode
from luthier.plan.cards import Card
from luthier.plan.engine import WHOLE, Engine, Pass, Sharding
from luthier.plan.families import family_of, sizes
from luthier.plan.memory import (
    Memory,
    largest,
    memory_of,
    rule_of_thumb,
    variants,
)
from luthier.plan.read import adapter_shape, engine_of, full_shape
from luthier.plan.shape import Shape
from luthier.plan.weights import weight_bytes
from luthier.plan.work import Work, work_stated

log = logging.getLogger("luthier")

# Share of the room that a run's own choice of a token budget fills (`models.memory`).
_BUDGET_SHARE = 0.85
_AUTO: dict[Mode, str] = {
    "keep": "nothing is computed again",
    "norms": "norms are computed again",
    "mlp": "norms and MLPs are computed again",
    "layer": "layers are computed again",
}


@dataclass(frozen=True)
class Line:
    """One way to train the model.

    Attributes:
        peak: bytes at the run's own pass. thumb: bytes by the classical rule, for full fine-tuning. fits: on the card.
        tokens: of the largest pass that fits. sequence: the longest sequence that fits. None without a card.
    """

    method: str
    trainable: int
    weights: float
    peak: float
    thumb: float | None = None
    fits: bool | None = None
    tokens: int | None = None
    sequence: int | None = None


@dataclass(frozen=True)
class Plan:
    """What a run will need.

    Attributes:
        one: the largest pass that the run will make. step_tokens: of the largest step.
        tokens_fit, sequence_fits: the largest pass and the longest sequence on the card; None without one.
        recompute: why this mode, where the config leaves it open.
    """

    shape: Shape
    engine: Engine
    work: Work
    card: Card | None
    one: Pass
    memory: Memory
    tokens_fit: int | None
    sequence_fits: int | None
    recompute: str
    lines: tuple[Line, ...]


def pass_of(work: Work, tokens: int) -> Pass:
    """A pass of so many of the run's tokens: its longest document, and others of the usual length."""
    longest = min(tokens, work.longest)
    rest = tokens - longest
    others = round(rest / work.mean)
    return _pass(work, tokens, longest, others, longest**2 + rest * work.mean_square)


def sequence_of(work: Work, tokens: int) -> Pass:
    """A pass that is one document, or one pair."""
    return _pass(work, tokens, tokens, 0, tokens**2)


def _pass(work: Work, tokens: int, longest: int, others: int, squares: float) -> Pass:
    """Of a pair, prompt and answers are taken to have the shares that they have in all of the data, and both answers
    one length.

    Args:
        longest: tokens of the longest row. others: how many more rows. squares: of the rows' tokens, added up.
    """
    labels, several = max(1, round(tokens * work.labelled)), tokens < work.largest_step
    if work.sides == 1:
        return Pass(tokens, labels, longest, round(squares), 1 + others, several)
    # Of a row of n tokens: the first branch is prompt and answer, side x n long; the second is the rest of n, and with
    # what it goes on from as long as the first.
    side = (1 + work.shared) / 2
    masked = round(squares * side * (1 - side)) if work.shared else 0
    apart = longest**2 * side * (1 - side) > REMEMBERED_FLOATS
    return Pass(
        tokens,
        labels,
        max(1, round(longest * side)),
        round(squares * side),
        2 * (1 + others),
        several,
        gathered=round(2 * side * tokens) if work.shared else 0,
        masked_once=0 if apart else masked,
        masked_each=masked if apart else 0,
    )


def make_plan(
    config: Config, model_config: Any, shape: Shape, engine: Engine, work: Work, card: Card | None, *, tokens: int = 0
) -> Plan:
    """Everything that can be said of a config's run.

    Args:
        tokens: size of the tokenizer; 0 if it is not known.
    """
    engine, why, one = settle(config, shape, engine, work, card)
    return Plan(
        shape=shape,
        engine=engine,
        work=work,
        card=card,
        one=one,
        memory=memory_of(shape, engine, one),
        tokens_fit=_fit(shape, engine, card, lambda n: pass_of(work, n)),
        sequence_fits=_fit(shape, engine, card, lambda n: sequence_of(work, n)),
        recompute=why,
        lines=tuple(_lines(config, model_config, shape, engine, work, card, tokens)),
    )


def settle(
    config: Config, shape: Shape, engine: Engine, work: Work, card: Card | None
) -> tuple[Engine, str, Pass]:
    """What the run leaves to memory: how much is computed again, why (empty where the config says it), and the largest
    pass."""
    why = ""
    if config.precision.gradient_checkpointing == "auto":
        engine, why = choose_recomputation(shape, engine, work, card, config)
    return engine, why, _chosen_pass(config, shape, engine, work, card)


def choose_recomputation(
    shape: Shape, engine: Engine, work: Work, card: Card | None, config: Config
) -> tuple[Engine, str]:
    """What `gradient_checkpointing: auto` comes to: the first mode in which what a pass has to hold has room, as
    `models.memory.choose_pass` does it, but with one mode for all layers."""
    if card is None:
        return engine, "auto: nothing is computed again, as no card says how much memory there is"
    asked = config.training.max_tokens_per_pass
    full_speed = FULL_SPEED_TOKENS["cpu"] if engine.cpu else FULL_SPEED_ELSEWHERE
    needed = max(work.longest, min(work.largest_step, asked if isinstance(asked, int) else full_speed))
    for mode in MODES:
        tried = replace(engine, recompute=mode)
        fits = memory_of(shape, tried, pass_of(work, needed)).total <= _budget(shape, tried, card)
        if mode != "offload" and fits and (shape.exact or mode in ("keep", "layer")):
            return tried, f"gradient_checkpointing auto: {_AUTO[mode]}"
    return replace(engine, recompute="layer"), f"gradient_checkpointing auto: {_AUTO['layer']}; that is not enough"


def _budget(shape: Shape, engine: Engine, card: Card) -> float:
    """Bytes up to which a run goes by itself: most of what is left beside what is always there."""
    fixed = memory_of(shape, engine, Pass(1, 1, 1, 1, several=True)).total
    return fixed + max(0.0, card.room - fixed) * _BUDGET_SHARE


def _chosen_pass(config: Config, shape: Shape, engine: Engine, work: Work, card: Card | None) -> Pass:
    """The largest pass that the run would make: bounded by its step, by the config, by the card."""
    asked = config.training.max_tokens_per_pass
    limit = work.largest_step
    if isinstance(asked, int):
        limit = min(limit, asked)
    elif engine.cpu:
        limit = min(limit, CPU_TOKENS)
    elif card is not None:
        room = _budget(shape, engine, card)
        limit = min(limit, largest(lambda n: memory_of(shape, engine, pass_of(work, n)).total <= room))
    return pass_of(work, max(limit, work.longest))


def _fit(shape: Shape, engine: Engine, card: Card | None, make: Callable[[int], Pass]) -> int | None:
    if card is None:
        return None
    return largest(lambda n: memory_of(shape, engine, make(n)).total <= card.room)


def _lines(
    config: Config, model_config: Any, shape: Shape, engine: Engine, work: Work, card: Card | None, tokens: int
) -> list[Line]:
    """Full fine-tuning, LoRA, 8-bit and 4-bit LoRA of the same model, with the config's other settings."""
    if config.adapter.adapter is None:
        full = shape
        lora = adapter_shape(config, model_config, _usual_adapter(), tokens=tokens)
    else:
        full = full_shape(config, model_config, FreezeConfig(), tokens=tokens)
        lora = shape
    lines = []
    for method, (each, how) in variants(full, lora, engine).items():
        one = _chosen_pass(config, each, how, work, card)
        peak = memory_of(each, how, one).total
        lines.append(
            Line(
                method=method,
                trainable=each.trainable,
                weights=weight_bytes(each, how),
                peak=peak,
                thumb=rule_of_thumb(each.total) if method == "full" else None,
                fits=None if card is None else peak <= card.room,
                tokens=_fit(each, how, card, lambda n, e=each, h=how: _beside_others(work, n)),  # type: ignore[misc]
                sequence=_fit(each, how, card, lambda n: sequence_of(work, n)),
            )
        )
    return lines


def _beside_others(work: Work, tokens: int) -> Pass:
    """A pass for a search of the largest: beside others of its step."""
    return replace(pass_of(work, tokens), several=True)


def _usual_adapter() -> AdapterConfig:
    return AdapterConfig(adapter="lora", lora_target_linear=True)


# --- the inverse: what fits given cards ---------------------------------------------------------------------


@dataclass(frozen=True)
class Fitting:
    """One size and method on given cards: bytes on each card at the asked sequence, and the longest that fits."""

    size: str
    parameters: int
    method: str
    peak: float
    fits: bool
    sequence: int


def fit_family(
    config: Config, model_config: Any, family: str | None, card: Card, cards: int, *, cpu: bool
) -> list[Fitting]:
    """All published sizes of a family, in all ways to train them, spread over `cards` of a kind; the model itself,
    where the table has no family like it.

    Several cards share the model as FSDP2 does (`plan.engine.Sharding`), and every card runs a pass of its own. A
    pass is one document of `sequence_len`, every token trained, or one pair, each side of which has as many; with
    `gradient_checkpointing: auto`, layers are computed again.
    """
    name = family or family_of(model_config)
    models = sizes(name) if name else {"this model": model_config}
    adapter = config.adapter if config.adapter.adapter else _usual_adapter()
    limit = config.data.sequence_len
    work = work_stated(config, None, None, "")

    def alone(tokens: int) -> Pass:
        if work.sides == 1:
            return Pass(tokens, tokens, tokens, tokens**2, several=True)
        return replace(sequence_of(work, round(work.sides * tokens * work.computed)), several=True)

    sharding = Sharding(cards, 3, fsdp=True) if cards > 1 else WHOLE
    found = []
    for size, described in models.items():
        full = full_shape(config, described, FreezeConfig())
        lora = adapter_shape(config, described, adapter)
        engine = replace(engine_of(config, described, lora, card, cpu=cpu), quantised=None, sharding=sharding)
        if config.precision.gradient_checkpointing == "auto":
            engine = replace(engine, recompute="layer")
        for method, (shape, how) in variants(full, lora, engine).items():

            def needs(tokens: int, shape: Shape = shape, how: Engine = how) -> float:
                return memory_of(shape, how, alone(tokens)).total

            longest = largest(lambda n, needs=needs: needs(n) <= card.room)  # type: ignore[misc]
            found.append(Fitting(size, shape.total - shape.adapters, method, needs(limit), longest >= limit, longest))
    return found


def fitting_as_json(found: list[Fitting]) -> list[dict[str, Any]]:
    """For JSON, bytes rounded."""
    return [{**asdict(one), "peak": round(one.peak)} for one in found]
