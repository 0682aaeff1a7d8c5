"""Mixing: counts by definition and not by luck, every document as often as the next one of its source, the same steps
from any number of processes, and without a mix the order that there was before there were mixes."""

from __future__ import annotations

import json
import logging
import math
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from luthier.config import Config
from luthier.data.dataset import PreparedData, prepare
from luthier.data.loader import StepLoader
from luthier.data.mixed import mix_of, mix_of_run, mix_report, names_of
from luthier.data.mixing import Mix, evenly, exact
from luthier.data.order import Order
from luthier.data.packing import best_fit
from luthier.errors import ConfigError, DataError
from tests.data.datasets_hub import serving

CPU = torch.device("cpu")


def config_of(entries: Sequence[dict[str, Any]], **keys: Any) -> Config:
    listed = [{"path": f"{number}.jsonl", "type": "alpaca", **entry} for number, entry in enumerate(entries)]
    return Config.from_flat({"base_model": "toy", "sequence_len": 256, "datasets": listed, **keys})


def members_of(sizes: Sequence[int], rng: np.random.Generator) -> list[np.ndarray]:
    """So many documents for each source, of any index."""
    places = rng.permutation(sum(sizes))
    return [np.sort(part) for part in np.split(places, np.cumsum(sizes)[:-1])]


def made(sizes: Sequence[int], entries: Sequence[dict[str, Any]], seed: int = 0, **keys: Any) -> Mix:
    mix = Mix.of(config_of(entries, **keys), members_of(sizes, np.random.default_rng(seed)))
    assert mix is not None
    return mix


def order_of(mix: Mix | None, documents: int, *, rows: int = 4, packed_len: int | None = None, **keys: Any) -> Order:
    lengths = np.random.default_rng(5).integers(5, 60, size=documents)
    settings = {"rows_per_step": rows, "seed": 3, "shuffle": True, **keys}
    return Order(lengths, packed_len=packed_len, mix=mix, **settings)


def sources_of(mix: Mix) -> np.ndarray:
    """The source of each document."""
    found = np.empty(sum(map(len, mix.members)), int)
    for number, own in enumerate(mix.members):
        found[own] = number
    return found


def epochs_of(mix: Mix, number: int, **keys: Any) -> list[np.ndarray]:
    """The documents of the first epochs, in the order of their steps."""
    order = order_of(mix, sum(map(len, mix.members)), **keys)
    found = []
    for epoch in range(number):
        held = order.epoch(epoch)
        found.append(held.documents[[place for group in held.groups for place in group]])
    return found


def times_in(documents: np.ndarray, mix: Mix) -> np.ndarray:
    return np.bincount(documents, minlength=sum(map(len, mix.members)))


# --- no mix


@pytest.mark.parametrize("packed_len", [None, 100])
@pytest.mark.parametrize("shuffle", [True, False])
def test_without_a_mix_steps_are_what_they_were(shuffle: bool, packed_len: int | None) -> None:
    order = order_of(None, 37, shuffle=shuffle, packed_len=packed_len)
    groups = best_fit(order.lengths, packed_len) if packed_len else [[i] for i in range(37)]
    steps = math.ceil(len(groups) / 4)
    assert (order.steps_in(0), order.total_steps(2.3)) == (steps, math.ceil(2.3 * steps))
    for index in range(3 * steps):
        epoch, within = divmod(index, steps)
        drawn = np.random.default_rng((3, epoch)).permutation(len(groups)) if shuffle else np.arange(len(groups))
        rows = [row for group in drawn[within * 4 : within * 4 + 4] for row in groups[group]]
        assert order.step(index) == (epoch, rows, [0] * len(rows))


@pytest.mark.parametrize(
    ("entries", "keys"),
    [
        ([{}, {}], {}),
        ([{"weight": 1}, {"weight": 1.0}], {}),
        ([{"epochs": 3}, {}], {"num_epochs": 3}),
        ([{"weight": 5}], {"mix_strategy": "interleave"}),
        ([{}], {"mix_strategy": "temperature"}),
    ],
)
def test_what_changes_nothing_is_no_mix(
    entries: list[dict[str, Any]], keys: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "luthier")
    members = members_of([7] * len(entries), np.random.default_rng(0))
    assert Mix.of(config_of(entries, **keys), members) is None
    assert ("has one dataset to mix" in caplog.text) == ("mix_strategy" in keys)


# --- concat


@pytest.mark.parametrize("seed", range(12))
def test_concat_has_each_source_as_often_as_its_weight_says(seed: int) -> None:
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 40, size=rng.integers(1, 5)).tolist()
    weights = [float(w) for w in rng.choice([0.1, 0.3, 0.5, 0.75, 1, 1.5, 2, 3.7], size=len(sizes))]
    weights[0] = 1.5
    mix = made(sizes, [{"weight": weight} for weight in weights], seed)
    owner = sources_of(mix)
    total = np.zeros(len(owner), int)
    for number, held in enumerate(epochs_of(mix, 7, shuffle=bool(seed % 2)), start=1):
        total += times_in(held, mix)
        for source, (size, weight) in enumerate(zip(sizes, weights, strict=True)):
            exactly = Fraction(str(weight)) * size * number
            assert abs(total[owner == source].sum() - exactly) <= Fraction(1, 2)
            for times in (total, times_in(held, mix)):  # over the run and in an epoch
                assert np.ptp(times[owner == source]) <= 1
    assert (total == mix.seen(7, 3, bool(seed % 2))).all()


def test_halves_are_two_halves_and_twice_is_twice() -> None:
    mix = made([10, 6], [{"weight": 0.5}, {"weight": 2}])
    owner = sources_of(mix)
    one, other = epochs_of(mix, 2)
    assert set(one[owner[one] == 0]) | set(other[owner[other] == 0]) == set(mix.members[0])
    assert (times_in(one, mix)[mix.members[1]] == 2).all()
    assert one.tolist() != sorted(one.tolist())
    plain = [held.tolist() for held in epochs_of(mix, 2, shuffle=False)]
    first, second = (part.tolist() for part in mix.members)
    assert plain == [first[:5] + second + second, first[5:] + second + second]


@pytest.mark.parametrize("epochs", [1, 2, 3, 2.5, 0.3])
@pytest.mark.parametrize("packed_len", [None, 90])
def test_epochs_of_a_dataset_come_out_exactly(epochs: float, packed_len: int | None) -> None:
    mix = made([30, 7, 11], [{"epochs": 1}, {"epochs": 4}, {}], num_epochs=epochs)
    order = order_of(mix, 48, packed_len=packed_len)
    steps = order.total_steps(epochs)
    run = Counter(row for index in range(steps) for row in order.step(index)[1])
    assert [run[row] for row in mix.members[0]] == [1] * 30
    assert [run[row] for row in mix.members[1]] == [4] * 7
    assert sum(run[row] for row in mix.members[2]) == math.floor(11 * exact(epochs) + Fraction(1, 2))
    assert order.epochs_before(steps) == pytest.approx(epochs)
    assert order.steps_per_epoch(epochs) * epochs == pytest.approx(steps)
    assert len(order.step(steps)[1]) > 0  # a run may look at what would come next


# --- interleave, temperature


@pytest.mark.parametrize("stopping", ["first_exhausted", "all_exhausted"])
@pytest.mark.parametrize("strategy", ["interleave", "temperature"])
@pytest.mark.parametrize("seed", range(6))
def test_parts_are_exact_and_evenly_spread(seed: int, strategy: str, stopping: str) -> None:
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 60, size=rng.integers(2, 7)).tolist()
    weights = [round(float(w), 2) for w in rng.uniform(0.05, 3, size=len(sizes))]
    keys: dict[str, Any] = {"mix_strategy": strategy, "mix_stopping": stopping}
    heat = 1.0
    if strategy == "temperature":
        heat = keys["mix_temperature"] = float(rng.choice([1, 1.5, 2, 5]))
    mix = made(sizes, [{"weight": weight} for weight in weights], seed, **keys)
    score = [(w * n) ** (1 / heat) if strategy == "temperature" else w for w, n in zip(weights, sizes, strict=True)]
    share = np.array(score) / sum(score)
    ends = [size / part for size, part in zip(sizes, share, strict=True)]
    length = min(ends) if stopping == "first_exhausted" else max(ends)
    assert np.abs(np.array(mix.fixed) - length * share).max() <= 0.5 + 1e-6
    assert mix.fixed[ends.index(length)] == sizes[ends.index(length)]
    owner = sources_of(mix)
    for held in epochs_of(mix, 3, shuffle=bool(seed % 3)):
        times = times_in(held, mix)
        assert (times.max() <= 1) if stopping == "first_exhausted" else (times.min() >= 1)
        for source, count in enumerate(mix.fixed):
            here = owner[held] == source
            assert here.sum() == count and np.ptp(times[owner == source]) <= 1
            far = np.cumsum(here) - np.arange(1, len(held) + 1) * count / len(held)
            assert np.abs(far).max() < 1


@pytest.mark.parametrize("stopping", ["first_exhausted", "all_exhausted"])
@pytest.mark.parametrize("sizes", [(3, 5), (4, 4, 9), (1, 6, 2, 3)])
def test_equal_parts_are_those_of_interleave_datasets(sizes: tuple[int, ...], stopping: Any) -> None:
    from datasets import Dataset, interleave_datasets

    config = config_of([{}] * len(sizes), mix_strategy="interleave", mix_stopping=stopping, shuffle=False)
    members = [np.arange(size) + 100 * number for number, size in enumerate(sizes)]
    mixed = interleave_datasets(
        [Dataset.from_dict({"row": own.tolist()}) for own in members], stopping_strategy=stopping
    )
    flat = np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1])
    mix = Mix.of(config, flat)
    assert mix is not None
    names = np.concatenate(members)
    [held] = epochs_of(mix, 1, shuffle=False)
    assert names[held].tolist() == mixed["row"][:]


def test_parts_are_the_probabilities_of_interleave_datasets() -> None:
    from datasets import Dataset, interleave_datasets

    sizes, parts = (400, 900, 2000), (0.5, 0.2, 0.3)
    drawn = interleave_datasets(
        [Dataset.from_dict({"source": [number] * size}) for number, size in enumerate(sizes)],
        probabilities=list(parts),
        seed=0,
        stopping_strategy="first_exhausted",
    )
    by_lot = np.bincount(drawn["source"][:], minlength=3)
    keys: dict[str, Any] = {"mix_strategy": "interleave", "mix_stopping": "first_exhausted"}
    mix = made(sizes, [{"weight": part} for part in parts], **keys)
    assert mix.fixed == (400, 160, 240)  # 0.5 : 0.2 : 0.3 until the 400 are through
    assert np.abs(by_lot / by_lot.sum() - np.array(mix.fixed) / sum(mix.fixed)).max() < 0.05


def test_temperature_goes_from_in_proportion_to_even() -> None:
    sizes = [27, 8, 125]
    entries: list[dict[str, Any]] = [{}, {}, {}]
    keys: dict[str, Any] = {"mix_strategy": "temperature"}
    assert made(sizes, entries, **keys, mix_temperature=1).fixed == (27, 8, 125)
    assert made(sizes, entries, **keys, mix_temperature=3, mix_stopping="first_exhausted").fixed == (12, 8, 20)
    assert made(sizes, entries, **keys, mix_temperature=1e6).fixed == (125, 125, 125)


def test_evenly_meets_its_bound() -> None:
    rng = np.random.default_rng(0)
    for _ in range(60):
        counts = tuple(rng.integers(0, 50, size=rng.integers(1, 9)).tolist())
        if not any(counts):
            continue
        order, total = evenly(counts), sum(counts)
        for source, count in enumerate(counts):
            far = np.cumsum(order == source) - np.arange(1, total + 1) * count / total
            assert (order == source).sum() == count and np.abs(far).max() < 1
    big = evenly((1000, *[3] * 20))
    assert max(np.diff(np.flatnonzero(big > 0))) < 40  # the small ones do not stand together


def test_packed_rows_hold_the_epoch_and_the_parts_hold_in_stretches() -> None:
    keys: dict[str, Any] = {"mix_strategy": "interleave"}
    mix = made([900, 2400], [{"weight": 1}, {"weight": 3}], **keys)
    lengths = order_of(None, 3300).lengths
    [plain], [packed] = epochs_of(mix, 1), epochs_of(mix, 1, packed_len=256)
    assert (times_in(plain, mix) == times_in(packed, mix)).all()
    groups = order_of(mix, 3300, packed_len=256).epoch(0).groups
    assert len(groups) * 256 < lengths[packed].sum() * 1.03
    owner = sources_of(mix)
    for first in range(0, len(packed) - 1024, 1024):
        assert abs((owner[packed[first : first + 1024]] == 0).sum() - 256) <= 1


# --- steps


@pytest.mark.parametrize("packed_len", [None, 120])
@pytest.mark.parametrize(
    ("entries", "keys"),
    [
        ([{"weight": 0.3}, {"weight": 1.7}, {}], {}),
        ([{"weight": 2}, {"weight": 0.25}, {}], {"mix_strategy": "interleave"}),
        ([{}, {"weight": 3}, {}], {"mix_strategy": "temperature", "mix_stopping": "first_exhausted"}),
    ],
)
def test_steps_are_the_epochs_from_any_place(
    entries: list[dict[str, Any]], keys: dict[str, Any], packed_len: int | None
) -> None:
    sizes = [33, 9, 20]
    mix = made(sizes, entries, **keys)
    order = order_of(mix, 62, packed_len=packed_len)
    total = order.total_steps(4)
    steps = [order.step(index) for index in range(total)]
    for epoch, held in enumerate(epochs_of(mix, 4, packed_len=packed_len)):
        assert [row for at, rows, _ in steps if at == epoch for row in rows] == held.tolist()
        assert sum(at == epoch for at, _, _ in steps) == order.steps_in(epoch)
        copies = [pair for at, rows, again in steps if at == epoch for pair in zip(rows, again, strict=True)]
        assert len(set(copies)) == len(copies)
    for index in np.random.default_rng(0).permutation(total)[:6].tolist():  # as a run that goes on begins
        again = order_of(mix, 62, packed_len=packed_len)
        assert again.step(index) == steps[index]
        counted = np.bincount([row for _, rows, _ in steps[:index] for row in rows], minlength=62)
        assert (again.seen(index) == counted).all()
        assert 0 <= again.epochs_before(index) - steps[index][0] < 1
    assert order.total_steps(1.5) == order.total_steps(1) + math.ceil(order.steps_in(1) / 2)


def test_nothing_and_too_much_are_errors() -> None:
    with pytest.raises(DataError, match="an epoch of this mix holds no example"):
        made([4], [{"weight": 0.1}])
    with pytest.raises(DataError, match=r"has 300,000,000 examples.*lower the largest `weight`"):
        made([3], [{"weight": 1e8}])
    with pytest.raises(DataError, match=r"bring the weights nearer together, or write `mix_stopping: first_exh"):
        made([300, 2], [{"weight": 1e-6}, {}], mix_strategy="interleave")
    with pytest.raises(DataError, match=r"0\.jsonl: nothing of it is left"):
        made([0, 2], [{}, {}], mix_strategy="interleave")


@pytest.mark.parametrize(
    ("entry", "keys", "message"),
    [
        ({"weight": 0}, {}, r"datasets\.0\.weight: has to be greater than 0"),
        ({"weight": -1}, {}, r"datasets\.0\.weight: has to be greater than 0"),
        ({"weight": math.inf}, {}, r"datasets\.0\.weight: expected a finite number"),
        ({"weight": "half"}, {}, r"datasets\.0\.weight: expected a number"),
        ({"epochs": 0}, {}, r"datasets\.0\.epochs: has to be greater than 0"),
        ({"epochs": 2, "weight": 1}, {}, r"and so does weight: leave out one"),
        ({"epochs": 2}, {"max_steps": 3}, r"max_steps ends the run somewhere else"),
        ({"epochs": 2}, {"mix_strategy": "interleave"}, r"write `weight` there, or leave mix_strategy out"),
        ({"epochs": 2}, {"mix_strategy": "temperature"}, r"write `weight` there"),
        ({}, {"mix_temperature": 2}, r"mix_temperature is for `mix_strategy: temperature`"),
        ({}, {"mix_strategy": "interleave", "mix_temperature": 2}, r"mix_temperature is for"),
        ({}, {"mix_strategy": "temperature", "mix_temperature": 0}, r"has to be greater than 0"),
        ({}, {"mix_stopping": "all_exhausted"}, r"mix_stopping does nothing where datasets are put together"),
        ({}, {"mix_strategy": "interleave_under"}, r"Write interleave, and `mix_stopping: first_exhausted`"),
        ({}, {"mix_strategy": "random"}, r"expected concat, interleave or temperature"),
        ({}, {"interleave_probs": [0.5, 0.5]}, r"Write `weight` in each entry"),
        ({}, {"weight": 2}, r"It belongs inside an entry of datasets"),
        ({"wieght": 2}, {}, r"Did you mean weight\?"),
        ({}, {"test_datasets": [{"path": "t", "type": "alpaca", "weight": 2}]}, r"test_datasets\.0\.weight does noth"),
    ],
)
def test_what_a_config_cannot_ask_for(entry: dict[str, Any], keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_of([entry, {}], **keys)


def test_a_temperature_has_a_default_that_is_said() -> None:
    config = config_of([{}, {}], mix_strategy="temperature")
    assert config.data.mix_temperature == 2
    assert config.origins["mix_temperature"].startswith("derived")


# --- prepared data


@pytest.fixture
def two_files(tmp_path: Path) -> list[dict[str, Any]]:
    entries = []
    for name, count in (("own", 12), ("big", 50)):
        rows = [
            {"instruction": f"{name} {n}", "output": "word " * (1 + n % 5) if n % 10 != 3 else "word " * 400}
            for n in range(count)
        ]
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        entries.append({"path": str(path)})
    return entries


def prepared(config: Config, tokenizer: PreTrainedTokenizerFast) -> tuple[PreparedData, StepLoader]:
    data = prepare(config, tokenizer)
    mix = mix_of(config, data)
    epochs = config.training.num_epochs
    settings: dict[str, Any] = {"rows_per_step": 4, "tokens_per_pass": 500, "seed": 1, "shuffle": True}
    return data, StepLoader(data.train, mix=mix, epochs=epochs, **settings)


def test_documents_are_counted_where_they_come_from(
    two_files: list[dict[str, Any]], toy_tokenizer: PreTrainedTokenizerFast
) -> None:
    config = config_of(
        [two_files[0] | {"weight": 3}, two_files[1] | {"weight": 0.5}], val_set_size=9, num_epochs=2, shuffle=True
    )
    data, loader = prepared(config, toy_tokenizer)
    assert sum(source.kept for source in data.report.sources) < 62  # some are too long
    steps = loader.total_steps(2)
    report = mix_report(config, data, loader.order, steps)
    assert report is not None and report.mixed and report.steps == steps
    found: Counter[str] = Counter()
    trained: Counter[str] = Counter()
    for index in range(steps):
        step = loader.step(index)
        assert step.trained_tokens == data.train.trained[list(step.rows)].sum()
        for row in step.rows:
            name = data.train.location(row).rpartition("/")[2].partition(":")[0]
            found[name] += 1
            trained[name] += int(data.train.trained[row])
    for source in report.sources:
        held = sum(source.name in data.train.location(row) for row in range(len(data.train)))
        assert (source.documents, source.examples) == (held, found[source.name])
        assert source.trained_tokens == trained[source.name]
        assert source.share == found[source.name] / found.total()
        assert source.trained_share == trained[source.name] / trained.total()
        assert source.epochs == found[source.name] / held
        assert source.unseen == 0
    assert [source.epochs for source in report.sources] == [6, 1]
    said = list(report.lines())
    assert [level for level, _ in said] == [logging.INFO] * 4 + [logging.WARNING]
    assert "own.jsonl: the run goes 6 times through it" in said[-1][1]
    assert loader.per_step(data.train.trained) == pytest.approx(trained.total() / steps, rel=0.1)


def test_a_source_that_is_hardly_seen_is_said(
    two_files: list[dict[str, Any]], toy_tokenizer: PreTrainedTokenizerFast
) -> None:
    config = config_of(two_files, shuffle=False, max_steps=6, micro_batch_size=2)
    report = mix_of_run(config, prepare(config, toy_tokenizer))
    assert report is not None and not report.mixed
    assert [text for level, text in report.lines() if level == logging.WARNING] == [
        "big.jsonl: 44 of its 45 documents are in no step of the run"
    ]
    alone = config_of(two_files[:1])
    assert mix_of_run(alone, prepare(alone, toy_tokenizer)) is None
    assert names_of(config_of([two_files[0]] * 2).data.datasets) == [f"{two_files[0]['path']} ({n})" for n in (1, 2)]


def test_weights_tokenise_nothing_again(
    two_files: list[dict[str, Any]], toy_tokenizer: PreTrainedTokenizerFast
) -> None:
    first = prepare(config_of(two_files), toy_tokenizer)
    for entries, keys in (
        ([two_files[0] | {"weight": 2}, two_files[1]], {"mix_strategy": "interleave"}),
        ([two_files[0] | {"epochs": 2}, two_files[1]], {}),
    ):
        again = prepare(config_of(entries, **keys), toy_tokenizer)
        assert again.report.cache_hit and again.fingerprint == first.fingerprint


def test_copies_draw_dropout_anew_and_processes_share_a_step(
    two_files: list[dict[str, Any]], toy_tokenizer: PreTrainedTokenizerFast
) -> None:
    config = config_of([two_files[0] | {"weight": 3}, two_files[1]], mix_strategy="interleave")
    data, loader = prepared(config, toy_tokenizer)
    plain = loader.once()
    assert plain.order.mix is None and plain is not loader and loader.order.mix is not None
    assert sorted(row for index in range(plain.order.steps_in(0)) for row in plain.step(index).rows) == list(
        range(len(data.train))
    )
    seeds: dict[int, set[int]] = {}
    unmixed = {
        batch.rows[n]: seed
        for index in range(plain.order.steps_in(0))
        for batch in plain.batches(plain.step(index), CPU)
        for n, seed in enumerate(batch.seeds)
    }
    times: Counter[int] = Counter()
    for index in range(loader.order.steps_in(0)):
        step = loader.step(index)
        halves = []
        for rank in range(2):
            half = StepLoader(
                data.train, rows_per_step=4, tokens_per_pass=500, seed=1, shuffle=True, mix=mix_of(config, data),
                rank=rank, processes=2,
            )  # fmt: skip
            assert half.step(index).rows == step.rows and half.step(index).copies == step.copies
            halves += [step.rows[i] for own in half.step(index).passes for i in own]
        assert sorted(halves) == sorted(step.rows)
        for batch in loader.batches(step, CPU):
            for row, seed in zip(batch.rows, batch.seeds, strict=True):
                times[row] += 1
                seeds.setdefault(row, set()).add(seed)
    assert max(times.values()) > 3
    assert {row: len(found) for row, found in seeds.items()} == dict(times)
    assert all(unmixed[row] in found for row, found in seeds.items())


def test_no_answer_is_a_mismatch_of_its_own_prompt(
    toy_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    path = tmp_path / "answers.jsonl"
    rows = [{"prompt": f"Q{n}:", "completion": f" {n} is it", "label": n % 2 == 0} for n in range(5)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = Config.from_flat(
        {"base_model": "toy", "datasets": [{"path": str(path), "weight": 4}], "rl": "kto", "sequence_len": 64}
    )
    data, loader = prepared(config, toy_tokenizer)
    own = {tuple(data.train[row].input_ids.tolist()) for row in range(5)}
    neighbours = 0
    for index in range(loader.total_steps(6)):
        step = loader.step(index)
        neighbours += any(one == other for one, other in zip(step.rows, step.rows[1:], strict=False))
        for batch in loader.mismatched(step, CPU):
            ids = batch.input_ids.split(list(batch.lengths))
            assert not own & {tuple(each.tolist()) for each in ids}
    assert neighbours  # else nothing was tried


# --- one's own data with a hub's

_MIX = """
import json, sys
from luthier.config import Config
from luthier.data.dataset import prepare
from luthier.data.loader import StepLoader
from luthier.data.mixed import mix_of, mix_of_run
from transformers import PreTrainedTokenizerFast

config = Config.from_flat(json.loads(sys.argv[1]))
tokenizer = PreTrainedTokenizerFast.from_pretrained(sys.argv[2])
data = prepare(config, tokenizer)
loader = StepLoader(data.train, rows_per_step=4, tokens_per_pass=500, seed=1, shuffle=True, mix=mix_of(config, data))
rows = [data.train.location(row) for index in range(loader.total_steps(1)) for row in loader.step(index).rows]
report = mix_of_run(config, data)
print(json.dumps({"rows": rows, "epochs": {s.name: s.epochs for s in report.sources}, "cached": data.report.cache_hit}))
"""


@pytest.mark.parametrize("away", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_own_rows_beside_a_dataset_of_the_hub(
    away: bool, toy_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    toy_tokenizer.save_pretrained(tmp_path / "tokenizer")
    own = tmp_path / "own.jsonl"
    own.write_text("".join(json.dumps({"instruction": f"mine {n}", "output": f"{n}"}) + "\n" for n in range(10)))
    theirs = "".join(json.dumps({"instruction": f"theirs {n}", "output": f"{n}"}) + "\n" for n in range(40)).encode()
    flat = {
        "base_model": "toy",
        "sequence_len": 128,
        "datasets": [
            {"path": str(own), "type": "alpaca"},
            {"path": "ada/chores#36", "type": "alpaca", "weight": 3},
        ],
        "mix_strategy": "interleave",
        "dataset_prepared_path": str(tmp_path / "tokens"),
    }
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_OFFLINE")}
    environment |= {"HF_HOME": str(tmp_path / "hub"), "OMP_NUM_THREADS": "1"}

    def run(url: str) -> dict[str, Any]:
        done = subprocess.run(
            [sys.executable, "-c", _MIX, json.dumps(flat), str(tmp_path / "tokenizer")],
            env=environment | {"HF_ENDPOINT": url}, capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return dict(json.loads(done.stdout.splitlines()[-1]))

    with serving({"ada/chores": {"README.md": b"# Chores\n", "data/train.jsonl": theirs}}) as (url, asked):
        found = run(url)
    assert any(request.startswith("GET") and request.endswith("data/train.jsonl") for request in asked)
    times = Counter(place.rpartition(":")[0] for place in found["rows"])
    assert times == {str(own): 12, "ada/chores": 36}
    assert len({place for place in found["rows"] if place.startswith("ada")}) == 36
    assert found["epochs"] == {"own.jsonl": 1.2, "chores#36": 1.0}
    if away:  # the hub is gone, and its cache is there
        again = run(url)
        assert again["rows"] == found["rows"] and again["cached"]
