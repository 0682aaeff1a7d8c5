"""Several GPUs: what each strategy needs of every one of them, what it costs in communication, and which to take.

Every rank has passes of its own, so that its activations are those of a single GPU with the same config; what differs
is how the model's state lies on the ranks (`plan.weights`, `plan.memory`) and what they send each other
(`plan.traffic`). The fastest strategy that fits is recommended; of those that come within a hundredth of it, or a
millisecond of a step, the simplest, and one that waits for the host only where nothing else fits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from luthier.config import Config
from luthier.config.sharding import flaws
from luthier.config.zero import PRESETS, zero_settings
from luthier.plan.cards import Card
from luthier.plan.engine import WHOLE, Engine, Pass, Sharding
from luthier.plan.links import Links
from luthier.plan.memory import Memory, memory_of
from luthier.plan.plan import settle
from luthier.plan.read import sharding_of, zero_sharding
from luthier.plan.shape import Shape
from luthier.plan.traffic import Compute, traffic
from luthier.plan.work import Work, flops_per_token, forward_flops

# A strategy is recommended before simpler ones if it is faster by more than this share.
_WORTH = 0.01
# And by more than this in a step: what each collective takes to begin is not counted, and is of that order in all.
_WORTH_SECONDS = 1e-3
_KEYS = ("ddp", "fsdp_version", "fsdp_config", "dp_shard_size", "dp_replicate_size", "deepspeed")


@dataclass(frozen=True)
class Strategy:
    """A way to share a model's state between processes, and the keys of a config that choose it."""

    name: str
    sharding: Sharding
    keys: Mapping[str, Any]


@dataclass(frozen=True)
class Row:
    """What one strategy comes to on each GPU.

    Attributes:
        chosen: whether the config has it. refused: why it cannot be had with this config; empty if it can.
        one: the largest pass. passes: of a usual step. recompute: why as much is computed again, where that is open.
        sent: bytes in a step. seconds: of communication in a step. exposed: what of it nothing hides.
        compute: seconds of computation in a step. tokens_per_second: of all GPUs together. None where the speed is not
            known; then nothing counts as hidden.
    """

    strategy: Strategy
    chosen: bool
    refused: str
    memory: Memory
    one: Pass
    passes: int
    recompute: str
    fits: bool | None
    sent: float
    seconds: float
    exposed: float
    compute: float | None
    tokens_per_second: float | None

    @property
    def share(self) -> float | None:
        """Of a step's time, what goes to communication."""
        return None if self.compute is None else self.exposed / (self.compute + self.exposed)


@dataclass(frozen=True)
class Scaling:
    """All strategies on so many GPUs. `best`: the recommended one, None if none can be; `why`: the reason."""

    gpus: int
    links: Links
    rows: tuple[Row, ...]
    best: Row | None
    why: str

    @property
    def chosen(self) -> Row:
        """That of the config."""
        return next(row for row in self.rows if row.chosen)


def strategies(config: Config, gpus: int, per_node: int) -> list[Strategy]:
    """Those to compare, simplest first; that of the config is among them."""
    found = [*_usual(gpus, per_node)]
    own = sharding_of(config, gpus)
    if all(strategy.sharding != own for strategy in found):
        flat = config.flat()
        keys = {key: flat[key] for key in _KEYS if flat[key] is not None}
        found.append(Strategy("as the config", own, keys))
    return found


def _usual(gpus: int, per_node: int) -> Iterator[Strategy]:
    fsdp = {"fsdp_version": 2}
    yield Strategy("replicas", WHOLE, {"ddp": True})
    yield Strategy("fsdp", Sharding(gpus, 3, fsdp=True), fsdp)
    kept = {**fsdp, "fsdp_config": {"reshard_after_forward": False}}
    yield Strategy("fsdp, no reshard", Sharding(gpus, 3, fsdp=True, reshard=False), kept)
    if 1 < per_node < gpus:
        sizes = {"dp_shard_size": per_node, "dp_replicate_size": gpus // per_node}
        yield Strategy(f"hybrid {per_node} x {gpus // per_node}", Sharding(per_node, 3, fsdp=True), {**fsdp, **sizes})
    for name in PRESETS:
        yield Strategy(name, zero_sharding(zero_settings(name), gpus), {"deepspeed": name})


def compare(
    config: Config,
    shape: Shape,
    engine: Engine,
    work: Work,
    card: Card | None,
    links: Links,
    gpus: int,
    flops_per_second: float | None,
) -> Scaling:
    """Every strategy on so many GPUs.

    Args:
        engine: of a run of this config, however it is spread. flops_per_second: that a GPU computes with.
    """
    own = sharding_of(config, gpus)
    rows = tuple(
        _row(config, strategy, shape, engine, work, card, links, gpus, flops_per_second, own)
        for strategy in strategies(config, gpus, links.per_node)
    )
    best, why = recommend(rows, card)
    return Scaling(gpus, links, rows, best, why)


def _row(
    config: Config,
    strategy: Strategy,
    shape: Shape,
    engine: Engine,
    work: Work,
    card: Card | None,
    links: Links,
    gpus: int,
    rate: float | None,
    own: Sharding,
) -> Row:
    how, recompute, one = settle(config, shape, replace(engine, sharding=strategy.sharding), work, card)
    memory = memory_of(shape, how, one)
    tokens = tokens_of_step(config, work, gpus)
    passes = math.ceil(max(1.0, round(tokens / one.tokens, 6)))
    compute, of_pass = None, Compute(forward_only=work.forward_only)
    if rate is not None:
        # A counted token may be computed together with another's, or more than once.
        compute = tokens / work.computed * flops_per_token(shape, work, how) / rate
        forward = tokens * forward_flops(shape, work, head=False) / rate / passes
        everything = tokens * forward_flops(shape, work) * (1 + work.forward_only) / rate / passes
        backward = max(0.0, compute / passes - everything)
        of_pass = Compute(forward, backward, work.forward_only)
    sent = traffic(shape, how, links, gpus, passes, of_pass)
    return Row(
        strategy=strategy,
        chosen=strategy.sharding == own,
        refused=_refused(config, strategy) if strategy.sharding != own else "",
        memory=memory,
        one=one,
        passes=passes,
        recompute=recompute,
        fits=None if card is None else memory.total <= card.room,
        sent=sent.sent,
        seconds=sent.seconds,
        exposed=sent.exposed,
        compute=compute,
        tokens_per_second=None if compute is None else gpus * tokens / work.computed / (compute + sent.exposed),
    )


def tokens_of_step(config: Config, work: Work, gpus: int) -> float:
    """Tokens that one GPU computes in a usual step."""
    if work.tokens is not None and work.steps:
        return work.tokens * work.computed / work.steps / gpus
    each = config.data.sequence_len if config.data.sample_packing else work.mean
    return work.rows_per_step / gpus * each


def _refused(config: Config, strategy: Strategy) -> str:
    """What the config's own rules say to this strategy."""
    asked = config.flat() | dict.fromkeys(_KEYS) | dict(strategy.keys)
    return "; ".join(message for _, message in flaws(asked))


def recommend(rows: tuple[Row, ...], card: Card | None) -> tuple[Row | None, str]:
    """The fastest that fits and can be had, and a sentence that says why."""
    if card is None:
        return None, "no card is given, so that it is not known what fits: --gpu NAME or --memory SIZE"
    possible = [row for row in rows if not row.refused]
    fitting = [row for row in possible if row.fits]
    if not fitting:
        least = min(possible, key=lambda row: row.memory.total)
        return None, (
            f"none fits: the least is {least.memory.total / 2**30:,.2f} GiB ({least.strategy.name}) of "
            f"{card.room / 2**30:,.2f} GiB; a quantised base (adapter: qlora), a shorter sequence_len, "
            "gradient_checkpointing: true or more GPUs need less"
        )
    # What the host needs for its steps is not counted, so that it is asked to take them only where it must.
    on_device = [row for row in fitting if not row.strategy.sharding.offload] or fitting
    fastest = min(on_device, key=_time)
    best = next(
        row
        for row in on_device
        if _time(row) <= _time(fastest) * (1 + _WORTH) or _step(row) - _step(fastest) <= _WORTH_SECONDS
    )
    return best, _reason(best, possible, card)


def _time(row: Row) -> float:
    """Seconds for a given amount of work, up to a factor; of communication alone where the speed is not known."""
    return row.exposed if row.tokens_per_second is None else 1 / row.tokens_per_second


def _step(row: Row) -> float:
    """Seconds of a step; of its communication alone where the speed is not known."""
    return row.exposed + (row.compute or 0.0)


def _reason(best: Row, possible: list[Row], card: Card) -> str:
    fits = f"it fits ({best.memory.total / 2**30:,.2f} of {card.room / 2**30:,.2f} GiB)"
    share = best.share
    if share is None:
        costs = f"{1000 * best.exposed:,.1f} ms of a step go to communication"
    else:
        costs = f"{share:.1%} of the time goes to communication"
    simpler = possible[: possible.index(best)]
    if not simpler:
        return f"{fits}, {costs}, and nothing else is faster by more than {_WORTH:.0%}, or by a millisecond of a step"
    unfit = [row.strategy.name for row in simpler if not row.fits]
    slower = [row.strategy.name for row in simpler if row.fits]
    left = [f"{', '.join(unfit)}: too large"] if unfit else []
    left += [f"{', '.join(slower)}: slower{_recomputes(simpler, best)}"] if slower else []
    return f"{fits}, {costs}; {'; '.join(left)}"


def _recomputes(rows: list[Row], best: Row) -> str:
    """Why the simplest of those that are slower is, where it is not communication."""
    row = next(row for row in rows if row.fits)
    return "" if row.recompute == best.recompute else ", with less room, so that more is computed again"
