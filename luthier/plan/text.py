"""A plan as people and as programs read it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from luthier.plan.cards import CONTEXT_BYTES, FILLED, Card
from luthier.plan.engine import Engine
from luthier.plan.plan import Fitting, Plan, fitting_as_json
from luthier.plan.scaling_text import scaling_json, scaling_text
from luthier.plan.shape import BESIDE_LINEARS
from luthier.plan.strategies import Scaling
from luthier.plan.table import gib, table
from luthier.plan.work import Work

_PARTS = {
    "weights": "the model's own weights",
    "adapters": "LoRA in fp32, and its copies in the compute format",
    "gradients": "in fp32",
    "optimizer": "its state, and fp32 copies of trained 16-bit weights",
    "activations": "kept for the backward pass",
    "head": "logits of a chunk, hidden states of labels",
    "workspace": "what is made on the way",
    "reference": "a copy of the starting values that it needs",
}


_SPREAD = [
    "shared by FSDP2 (full sharding): weights, and of a model that is trained itself gradients and optimizer, evenly "
    "over the cards; embeddings, head and two layers gathered on each"
]


def as_text(plan: Plan, speed: dict[str, Any] | None, scaling: Scaling | None = None) -> str:
    """The plan for a terminal; `speed` as `plan.command` makes it, `scaling` where several GPUs share the run."""
    shape, one = plan.shape, plan.one
    share = 100 * shape.trainable / shape.total
    parts = [
        f"{shape.name}: {shape.total:,} parameters, {shape.trainable:,} of them trainable ({share:.2f}%)",
        f"{how(plan.engine)}; {plan.recompute or _recompute(plan.engine)}",
    ]
    if not shape.exact:
        parts.append(
            f"some layers run as transformers has them: what they keep is estimated as {BESIDE_LINEARS:g} x the widths "
            "of their linear layers, and may be a third off"
        )
    parts += [
        "",
        f"peak memory{_of_each(scaling)}: {gib(plan.memory.total)}, at this moment: {plan.memory.moment}, in a pass of "
        f"{one.tokens:,} tokens ({one.labels:,} trained)" + (", one of several of its step" if one.several else ""),
        *table([[name, gib(size), _PARTS[name]] for name, size in _parts(plan)], numbers=(1,)),
        "(what comes and goes, such as gradients, is counted as it is at that moment)",
        "",
    ]
    if plan.card is not None:
        parts += _on_card(plan, plan.card)
    else:
        parts.append("no card is given: --gpu NAME or --memory SIZE says what fits it")
    parts += ["", *_work(plan), *(_speed(speed, scaling) if speed else []), ""]
    if scaling is not None:
        parts += [*scaling_text(scaling), ""]
    parts += ["the ways to train this model, at the same settings otherwise:", *_lines(plan)]
    return "\n".join(line.rstrip() for line in parts).rstrip()


def _of_each(scaling: Scaling | None) -> str:
    return "" if scaling is None else f" of each of {scaling.gpus} GPUs ({scaling.chosen.strategy.name})"


def _parts(plan: Plan) -> list[tuple[str, float]]:
    """What supervised fine-tuning has none of is left out where it is nothing."""
    return [(name, size) for name, size in plan.memory.parts().items() if size or name != "reference"]


def how(engine: Engine) -> str:
    """What an engine computes and stores in."""
    compute = {4: "fp32", 2: "16 bits"}[engine.compute]
    weights = {"4bit": "NF4", "8bit": "int8", "fp8": "fp8"}.get(engine.quantised or "", "")
    stored = f", frozen linear layers in {weights}" if weights else ""
    if not weights and engine.frozen < engine.compute:
        stored = ", frozen weights in 16 bits as stored"
    return f"computed in {compute}{stored}, optimizer {engine.optimizer}"


def _recompute(engine: Engine) -> str:
    said = {
        "keep": "nothing is computed again in backward",
        "layer": "layers are computed again in backward",
        "offload": "layers are computed again in backward, their inputs waiting in host memory",
    }
    return said.get(engine.recompute, engine.recompute) + (", the MLP in tiles" if engine.tiled else "")


def _on_card(plan: Plan, card: Card) -> list[str]:
    fits = plan.memory.total <= card.room
    lines = [
        f"{card.name} ({gib(card.memory)}, of which tensors can fill {gib(card.room)}: {gib(CONTEXT_BYTES)} go to the "
        f"driver, {100 - 100 * FILLED:.0f}% of the rest to gaps): " + ("it fits" if fits else "IT DOES NOT FIT")
    ]
    if plan.tokens_fit:
        lines.append(f"the largest pass that fits: {plan.tokens_fit:,} tokens (max_tokens_per_pass)")
        longest = plan.sequence_fits or 0
        if plan.work.sides == 2:
            longest = round(longest * (1 + plan.work.shared) / 2)
        beyond = plan.shape.positions and longest > plan.shape.positions
        note = f"; the model was made for {plan.shape.positions:,}" if beyond else ""
        if plan.work.sides == 2:
            note = f", {longest:,} for each answer with the prompt{note}"
        lines.append(f"the longest {_one(plan.work, 'sequence')} that fits: {plan.sequence_fits:,} tokens{note}")
    else:
        lines.append("not even a pass of one token fits")
    return lines


def _work(plan: Plan) -> list[str]:
    work = plan.work
    lines = [f"data: {work.source}"]
    known = []
    if work.tokens is not None:
        known.append(f"{work.tokens:,} tokens in all")
    if work.steps is not None:
        unit = "" if work.unit == "documents" else f" {work.unit}"
        known.append(f"{work.steps:,} steps of {work.rows_per_step}{unit}")
    known.append(
        f"the longest {_one(work, 'document')} {work.longest:,} tokens, the largest step {work.largest_step:,}"
    )
    lines.append(", ".join(known))
    if work.computed < 1:
        lines.append(
            f"{work.computed:.0%} of the tokens are computed, the prompt of a pair once for both answers; so counted "
            "are the longest pair and the largest step"
        )
    return lines


def _one(work: Work, else_: str) -> str:
    return "pair" if work.sides == 2 else else_


def _speed(speed: dict[str, Any], scaling: Scaling | None) -> list[str]:
    lines = []
    if speed.get("flops_per_token"):
        more = speed.get("forward_only", 0)
        again = f", with {more:.2g} forward pass{'' if more == 1 else 'es'} without gradient" if more else ""
        lines.append(f"work: {speed['flops_per_token'] / 1e9:,.3g} GFLOP a token{again}")
    if speed.get("hours") is not None:
        at = f"{speed['tokens_per_second']:,.0f} tokens/s ({speed['from']})"
        lines.append(f"time: {speed['hours']:.2f} hours at {at}")
    elif speed.get("why_not"):
        lines.append(f"time: not known: {speed['why_not']}")
    if speed.get("cost") is not None:
        each = "" if scaling is None else f" for each of {scaling.gpus} GPUs"
        lines.append(f"cost: {speed['cost']:,.2f} at {speed['price_per_hour']:g} an hour{each}")
    return lines


def _lines(plan: Plan) -> list[str]:
    on_card = plan.card is not None
    longest = f"longest {_one(plan.work, 'sequence')}"
    head = ["", "trainable", "weights", "peak"] + (["fits", "largest pass", longest] if on_card else [])
    rows = [head]
    for line in plan.lines:
        row = [line.method, f"{line.trainable:,}", gib(line.weights), gib(line.peak)]
        if on_card:
            row += ["yes" if line.fits else "no", f"{line.tokens:,}", f"{line.sequence:,}"]
        rows.append(row)
    thumb = next(line.thumb for line in plan.lines if line.thumb is not None)
    rule = f"rule of thumb for full fine-tuning with Adam in fp32: 4 x the weights, {gib(thumb)}, activations aside"
    return [*table(rows, numbers=(1, 2, 3, 5, 6)), rule]


def fit_text(found: Sequence[Fitting], card: Card, cards: int, sequence: int, why: str, *, pairs: bool) -> str:
    """The inverse's table, and its answers."""
    one_pass = "one pair, both answers with the prompt as long" if pairs else "one document, every token trained"
    rows = [["size", "parameters", "method", f"a card at {sequence:,}", "fits", "longest sequence"]]
    for one in found:
        longest = f"{one.sequence:,}" if one.sequence else "-"
        rows.append(
            [one.size, f"{one.parameters:,}", one.method, gib(one.peak), "yes" if one.fits else "no", longest]
        )
    answers = []
    for method in dict.fromkeys(one.method for one in found):
        fitting = [one for one in found if one.method == method and one.fits]
        best = max(fitting, key=lambda one: one.parameters, default=None)
        answers.append(f"{method}: " + (f"{best.size}, up to {best.sequence:,} tokens" if best else "none fits"))
    return "\n".join(
        [
            f"{cards} x {card.name} of {gib(card.memory)}; {why}",
            *(_SPREAD if cards > 1 else []),
            f"{'on each card a pass of its own' if cards > 1 else 'a pass'}: {one_pass}",
            "",
            *table(rows, numbers=(1, 3, 5)),
            "",
            f"the largest that trains at {sequence:,} tokens:",
            *(f"  {answer}" for answer in answers),
        ]
    )


def as_json(plan: Plan, speed: dict[str, Any] | None, scaling: Scaling | None = None) -> dict[str, Any]:
    """Everything of a plan as plain data; sizes in bytes."""
    shape, work, card = plan.shape, plan.work, plan.card
    settings = {name: value for name, value in vars(plan.engine).items() if name != "sharding"}
    found = {
        "model": shape.name,
        "parameters": {"total": shape.total, "trainable": shape.trainable, "exact": shape.exact},
        "settings": {**settings, "gradient_checkpointing": plan.recompute or plan.engine.recompute},
        "pass": vars(plan.one),
        "memory": plan.memory.as_json(),
        "card": None if card is None else {"name": card.name, "memory": round(card.memory), "room": round(card.room)},
        "fits": None if card is None else plan.memory.total <= card.room,
        "largest_pass": plan.tokens_fit,
        "longest_sequence": plan.sequence_fits,
        "work": vars(work),
        "speed": speed,
        "methods": [vars(line) for line in plan.lines],
    }
    return found if scaling is None else {**found, "scaling": scaling_json(scaling)}


def fit_json(found: Sequence[Fitting], card: Card, cards: int, sequence: int) -> dict[str, Any]:
    """The inverse as plain data."""
    return {
        "card": {"name": card.name, "memory": round(card.memory), "room": round(card.room)},
        "num_gpus": cards,
        "sequence_len": sequence,
        "fits": fitting_as_json(list(found)),
    }
