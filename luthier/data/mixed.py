"""What a run's steps hold of each dataset, counted from the order that they are in."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from luthier.config import Config, DatasetEntry
from luthier.data.dataset import PreparedData
from luthier.data.mixing import Ints, Mix, members_of
from luthier.data.order import Order

log = logging.getLogger("luthier")

# Muennighoff et al. 2023, "Scaling Data-Constrained Language Models": up to 4 epochs of the same text are almost as
# good as new text, and what more of them add falls towards nothing.
MANY_EPOCHS = 4


@dataclass(slots=True)
class Mixed:
    """One of the datasets in the steps of a run.

    Attributes:
        documents: those to train on. an_epoch: examples of it in the first epoch. examples: in all steps.
        trained_tokens: those of the examples. unseen: documents that no step has.
    """

    name: str
    documents: int
    an_epoch: int
    examples: int
    share: float
    trained_tokens: int
    trained_share: float
    epochs: float
    unseen: int


@dataclass(slots=True)
class MixReport:
    """All of the datasets in the steps of a run."""

    how: str
    steps: int
    unit: str
    mixed: bool
    """Whether the config mixes them otherwise than each whole."""
    sources: list[Mixed] = field(default_factory=list)

    def lines(self) -> Iterator[tuple[int, str]]:
        """Log level and text of a table, and of what to think over."""
        yield logging.INFO, f"{self.how}; in {self.steps:,} steps:"
        head = ("dataset", self.unit, "an epoch", "in the run", "share", "of trained tokens", "epochs in the run")
        rows = [head] + [
            (
                source.name,
                *(f"{count:,}" for count in (source.documents, source.an_epoch, source.examples)),
                *(f"{share:.1%}" for share in (source.share, source.trained_share)),
                f"{source.epochs:.3g}",
            )
            for source in self.sources
        ]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for name, *cells in rows:
            shown = "  ".join(f"{cell:>{width}}" for cell, width in zip(cells, widths[1:], strict=True))
            yield logging.INFO, f"  {name:<{widths[0]}}  {shown}"
        for source in self.sources:
            if self.mixed and source.epochs > MANY_EPOCHS:
                yield (
                    logging.WARNING,
                    f"{source.name}: the run goes {source.epochs:.3g} times through it; beyond about {MANY_EPOCHS} "
                    "times the same text teaches little and is learnt by heart (Muennighoff et al. 2023): lower its "
                    "part, or watch the validation loss",
                )
            if source.unseen > source.documents / 2:
                yield (
                    logging.WARNING,
                    f"{source.name}: {source.unseen:,} of its {source.documents:,} {self.unit} are in no step of the "
                    "run",
                )


def mix_of(config: Config, data: PreparedData) -> Mix | None:
    """What the config makes of its datasets' training documents; None: an epoch holds each once.

    Raises:
        DataError: an epoch would hold nothing, or too much.
    """
    if config.data.streaming:  # which mixes as it reads
        return None
    return Mix.of(config, _members(data))


def mix_report(config: Config, data: PreparedData, order: Order, steps: int) -> MixReport | None:
    """What so many steps hold of each dataset; None for one dataset that is taken as it is, and for streams, whose
    rows are not known."""
    if config.data.streaming:
        return None
    members = _members(data)
    if order.mix is None and len(members) == 1:
        return None
    seen = order.seen(steps)
    counts = [len(own) for own in members] if order.mix is None else order.mix.counts(0)
    trained = seen * data.train.trained
    examples, tokens = int(seen.sum()), int(trained.sum())
    report = MixReport(_how(config, order.mix), steps, data.report.unit, order.mix is not None)
    for name, own, count in zip(names_of(config.data.datasets), members, counts, strict=True):
        here, of_tokens = int(seen[own].sum()), int(trained[own].sum())
        report.sources.append(
            Mixed(
                name=name,
                documents=len(own),
                an_epoch=count,
                examples=here,
                share=here / examples,
                trained_tokens=of_tokens,
                trained_share=of_tokens / tokens if tokens else 0.0,
                epochs=here / len(own) if len(own) else 0.0,
                unseen=int((seen[own] == 0).sum()),
            )
        )
    return report


def mix_figures(config: Config, data: PreparedData, order: Order, steps: int) -> dict[str, Any] | None:
    """`mix_report` for machines."""
    report = mix_report(config, data, order, steps)
    return None if report is None else asdict(report)


def mix_of_run(config: Config, data: PreparedData) -> MixReport | None:
    """What the steps of the config's run hold of each dataset, in one process."""
    training = config.training
    order = Order(
        data.train.lengths,
        rows_per_step=training.micro_batch_size * training.gradient_accumulation_steps,
        seed=training.seed,
        shuffle=config.data.shuffle,
        packed_len=config.data.sequence_len if config.data.sample_packing else None,
        mix=mix_of(config, data),
    )
    return mix_report(config, data, order, training.max_steps or order.total_steps(training.num_epochs))


def _how(config: Config, mix: Mix | None) -> str:
    data = config.data
    if mix is None:
        return "datasets put together whole"
    if data.mix_strategy == "concat":
        return "datasets put together (mix_strategy: concat), each as often as its weight or epochs say"
    until = "every dataset is" if data.mix_stopping == "all_exhausted" else "the first dataset is"
    heat = f", mix_temperature: {data.mix_temperature:g}" if data.mix_temperature is not None else ""
    return f"datasets mixed (mix_strategy: {data.mix_strategy}{heat}) until {until} through"


def names_of(entries: Sequence[DatasetEntry]) -> list[str]:
    """What to call each dataset: its file's name, or its whole path where two are called the same."""
    short = [Path(entry.path).name or entry.path for entry in entries]
    if len(set(short)) == len(short):
        return short
    return [f"{entry.path} ({number})" for number, entry in enumerate(entries, start=1)]


def _members(data: PreparedData) -> list[Ints]:
    return members_of(data.train.rows, [source.rows for source in data.report.sources])
