"""What repeats: equal rows, near ones, one prompt with several answers, and validation rows that training rows give
away."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from luthier.data.dataset import held_rows
from luthier.data.duplicates import GRAM, SharedRuns
from luthier.data.inspect.collect import Collected, Record
from luthier.data.inspect.sources import Material, rows_of
from luthier.data.inspect.verdict import Level, Verdict, share, worst
from luthier.data.inspect.views import hashed_words, views_of
from luthier.data.near import find_near, jaccard
from luthier.data.preferences import LeftOut
from luthier.errors import DataError

NEAR = 0.8
_BAD, _LOOK = 0.05, 0.01
_SKETCH = 256


def repeats(found: Collected, threshold: float) -> list[Verdict]:
    """Verdicts on duplicates, and where there is validation data on contamination. Marks the rows that repeat."""
    records = [record for record in found.records if record.readable and record.key]
    held, of_config = _held(found)
    train = [record for record in records if record.number not in held]
    validation = [record for record in records if record.number in held]
    in_validation = {record.key: record for record in reversed(validation)}
    equal = [record for record in train if record.key in in_validation]
    for record in equal:
        record.problems.append(("in the validation data", _as(record, in_validation[record.key])))
    left = [record for record in train if record.key not in in_validation]
    first: dict[bytes, Record] = {}
    exact, between = [], 0
    for record in left:
        twin = first.setdefault(record.key, record)
        if twin is not record:
            exact.append(record)
            between += twin.source != record.source
            record.problems.append(("repeats", _as(record, twin)))
    near, near_held, unsure = _near(list(first.values()), validation, threshold)
    verdicts = [_duplicates(found, train, exact, near, unsure, between, threshold)]
    if held:
        verdicts.append(_contamination(found, held, of_config, validation, equal, near_held, threshold))
    return verdicts


def _as(record: Record, twin: Record) -> str:
    file, _, line = twin.place.rpartition(":")
    return f"as line {line}" if record.place.rpartition(":")[0] == file else f"as {twin.place}"


def _duplicates(
    found: Collected, train: list[Record], exact: list[Record], near: int, unsure: int, between: int, threshold: float
) -> Verdict:
    answers: dict[bytes, set[bytes]] = defaultdict(set)
    for record in train:
        if record.prompt_key:
            answers[record.prompt_key].add(record.key)
    several = sum(len(keys) for keys in answers.values() if len(keys) > 1)
    again = (len(exact) + near) / max(1, len(train))
    level: Level = "bad" if again > _BAD else "look" if again > _LOOK else "fine"
    text = (
        f"{share(len(exact), len(train))} of rows repeat one before them word for word, "
        f"{share(near, len(train))} nearly "
        f"(Jaccard {threshold:g} of runs of 5 words, whole and answer); worth a look from 1 % on, bad from 5 %"
    )
    more = []
    if several:
        more.append(
            f"{share(several, len(train))} of rows have a prompt that other rows answer differently"
            + (", as preference data may" if found.material.config.preference.rl else "")
        )
    if between:
        more.append(f"{between:,} of the equal ones are in another dataset than what they repeat")
    if unsure:
        more.append(f"{unsure:,} rows have more likely twins than each was compared with, and may be repeats too")
    if exact or near:
        also = f" and `dataset_near_deduplication: {threshold:g}`" if near else ""
        more.append(f"`dataset_exact_deduplication: true`{also}: a run without them")
    figures = {"equal": len(exact), "near": near, "threshold": threshold, "same_prompt_other_answer": several,
               "between_datasets": between, "rows": len(train)}  # fmt: skip
    return Verdict("duplicated", level, text, figures, more)


def _near(train: list[Record], validation: list[Record], threshold: float) -> tuple[int, int, int]:
    """Rows that are near to one before, rows that are near to a validation row, and those that may be."""
    everything = [*validation, *train]

    def alike(one: int, other: int) -> bool:
        first, second = everything[one], everything[other]
        if first.label != second.label or len(first.sets) != len(second.sets):
            return False
        # The answers first: they are what mostly differs, and short.
        pairs = list(zip(first.sets, second.sets, strict=True))[::-1]
        return all(sketch_jaccard(a, b, threshold) >= threshold for a, b in pairs)

    result = find_near(
        len(everything), lambda number: everything[number].sets[0], alike, threshold, len(validation), length=1
    )
    near_held = 0
    for number, twin in result.twins.items():
        held = twin < len(validation)
        near_held += held
        what = "nearly in the validation data" if held else "nearly repeats"
        everything[number].problems.append((what, _as(everything[number], everything[twin])))
    return len(result.twins) - near_held, near_held, result.unsure


def sketch_jaccard(one: npt.NDArray[np.uint64], other: npt.NDArray[np.uint64], least: float = 0.0) -> float:
    """Of two sets of which the least 256 values are kept: exact below that, an estimate (Broder 1997) beyond. 0 where
    it cannot reach `least`."""
    if max(len(one), len(other)) < _SKETCH:
        return jaccard(one, other, least)
    both = np.union1d(one, other)[:_SKETCH]
    return float(np.mean(np.isin(both, one) & np.isin(both, other)))


# --- validation ---------------------------------------------------------------------------------------------


def _held(found: Collected) -> tuple[set[int], str]:
    """Numbers of the rows that are for validation, and the key that says so."""
    config = found.material.config
    if config.data.test_datasets:
        first = sum(found.rows[: len(config.data.datasets)])
        return set(range(first, sum(found.rows))), "test_datasets"
    if not config.data.val_set_size or found.stride > 1 or config.data.streaming:
        return set(), ""
    kept = [
        record.number
        for record in found.records
        if record.readable and record.trained and record.key and not _left_out(record, found.material)
    ]
    try:
        held = held_rows(np.array(kept), sum(found.rows), config.data.val_set_size, config.training.seed)
    except DataError:
        return set(), ""
    return set(np.flatnonzero(held).tolist()), "val_set_size"


def _left_out(record: Record, material: Material) -> bool:
    data = material.config.data
    splits = any(entry.type == "completion" for entry in data.datasets)
    return record.tokens > data.sequence_len and data.excess_length_strategy == "drop" and not splits


def _contamination(
    found: Collected,
    held: set[int],
    key: str,
    validation: list[Record],
    equal: list[Record],
    near: int,
    threshold: float,
) -> Verdict:
    sharing, short = _shared(found, held)
    levels: list[Level] = ["bad" if equal else "fine", "look" if near or sharing else "fine"]
    text = (
        f"{len(equal):,} training rows are in the validation data word for word, {near:,} nearly (Jaccard "
        f"{threshold:g}); "
        f"{share(len(sharing), len(held))} of {len(held):,} validation rows ({key}) have {GRAM} words in a "
        "row in common "
        "with training rows (the measure of the GPT-3 paper, appendix C)"
    )
    more = [f"{short:,} validation rows are too short to have {GRAM} words in a row"] if short else []
    places = {record.number: record.place for record in validation}
    if sharing:
        more.append("validation rows that share text: " + ", ".join(str(places.get(n, n)) for n in sharing[:3]))
    if equal or near:
        more.append("`dataset_exact_deduplication` and `dataset_near_deduplication` train without such rows")
    figures = {"equal": len(equal), "near": near, "sharing_text": len(sharing), "validation": len(held),
               "too_short": short, "words": GRAM}  # fmt: skip
    return Verdict("contaminated", worst(levels), text, figures, more)


def _shared(found: Collected, held: set[int]) -> tuple[list[int], int]:
    """Numbers of validation rows that share a run of words with training rows, and how many are too short for one. The
    rows are read again: a record does not hold its text."""
    runs = SharedRuns(GRAM)
    numbers = []
    for number, text in _texts(found.material, found.streamed):
        if number in held:
            runs.add(hashed_words(text))
            numbers.append(number)
    for number, text in _texts(found.material, found.streamed):
        if number not in held and number % found.stride == 0:
            runs.look(hashed_words(text))
    return [numbers[at] for at in runs.found()], runs.short


def _texts(material: Material, streamed: int | None) -> Iterator[tuple[int, str]]:
    number = -1
    for entry, _ in material.entries:
        for _, row in rows_of(entry, streamed):
            number += 1
            if isinstance(row, DataError):
                continue
            try:
                views = views_of(row, entry, material.config.data.train_on_inputs, material.config.preference.rl)
            except (DataError, LeftOut):
                continue
            yield number, "\n".join(view.text for view in views)

