"""Repeats: what is found, held against comparing each with each; what is left out, and what never is."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from luthier.config import Config
from luthier.data.dataset import PreparedData, prepare
from luthier.data.duplicates import SharedRuns, common_beginnings
from luthier.data.near import MOST_COMPARED, bands_of, find_near, hash_runs, jaccard, runs_of, shingles
from luthier.errors import ConfigError, DataError
from luthier.experiments.given import data_facts

WORDS = [f"{a}{b}" for a in ("ba", "do", "ki", "lu", "me") for b in ("ran", "sit", "tol", "vex", "zum", "pip")]


def text(seed: int, words: int = 30) -> str:
    draw = random.Random(seed)
    return " ".join(draw.choice(WORDS) for _ in range(words))


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def row(seed: int, question: str = "", output: str = "") -> dict[str, str]:
    return {"instruction": question or f"Say {seed}: {text(seed, 6)}", "output": output or text(1000 + seed)}


def prepared(tokenizer: PreTrainedTokenizerFast, *paths: Path, type: Any = "alpaca", **keys: Any) -> PreparedData:
    entries = [{"path": str(path), **({"type": type} if type else {})} for path in paths]
    config = Config.from_flat({"base_model": "toy", "sequence_len": 2048, "datasets": entries, **keys})
    return prepare(config, tokenizer)


def lines_of(data: PreparedData) -> list[int]:
    return [int(data.train.location(i).rpartition(":")[2]) for i in range(len(data.train))]


# --- near documents


def test_near_is_what_comparing_all_finds() -> None:
    draw = random.Random(0)
    documents = [[draw.randrange(500) for _ in range(draw.randint(3, 60))] for _ in range(150)]
    for number in range(100):
        copy = list(documents[number])
        for _ in range(draw.randint(0, 3)):
            copy[draw.randrange(len(copy))] = draw.randrange(500)
        documents.insert(draw.randrange(number + 1, len(documents) + 1), copy)
    values = [np.array(document, np.uint64) for document in documents]
    sets = [shingles(value) for value in values]
    for threshold, fixed in ((0.6, 0), (0.8, 0), (0.8, 60), (1.0, 0)):
        wanted: set[int] = set()
        for one in range(fixed, len(sets)):
            before = (other for other in range(one) if other not in wanted)
            if any(jaccard(sets[one], sets[other]) >= threshold for other in before):
                wanted.add(one)

        def alike(one: int, other: int, threshold: float = threshold) -> bool:
            return jaccard(sets[one], sets[other]) >= threshold

        found = find_near(len(values), values.__getitem__, alike, threshold, fixed)
        assert found.unsure == 0
        assert len(wanted) > 10
        assert len(wanted - set(found.twins)) <= 0.02 * len(wanted)  # 99 % of pairs at the threshold meet
        assert set(found.twins) <= wanted
        assert all(alike(one, other) and other < one for one, other in found.twins.items())


def test_bands_find_99_percent_at_the_threshold() -> None:
    for threshold in (0.5, 0.7, 0.8, 0.95):
        bands, rows = bands_of(threshold)
        assert bands * rows <= 128
        assert 1 - (1 - threshold**rows) ** bands >= 0.99
        more = rows + 1
        assert 1 - (1 - threshold**more) ** (128 // more) < 0.99


def test_many_likely_twins_are_said() -> None:
    same = np.arange(30, dtype=np.uint64)
    found = find_near(MOST_COMPARED + 40, lambda number: same, lambda one, other: False, 0.8)
    assert (found.twins, found.unsure) == ({}, 40)
    assert find_near(1, lambda number: same, lambda one, other: True, 0.8).twins == {}


def test_runs_end_with_their_document() -> None:
    pieces = [np.arange(7), np.arange(2), np.arange(0), np.arange(3, 9), np.arange(5)]
    runs, counts = runs_of(pieces, 5)
    assert counts.tolist() == [3, 0, 0, 2, 1]
    assert np.array_equal(runs, np.concatenate([hash_runs(piece, 5) for piece in pieces]))
    assert len(runs_of([np.arange(4)], 5)[0]) == 0


def test_common_beginnings() -> None:
    rows = [np.array(each) for each in ([1, 2, 3], [1, 2, 4], [1, 2], [1, 5, 6], [1, 5, 7], [8])]
    assert sorted(found.tolist() for found in common_beginnings(rows, 2)) == [[1, 2], [1, 5]]
    assert [found.tolist() for found in common_beginnings(rows, 4)] == [[1]]
    assert common_beginnings(rows, 6) == []


def test_shared_runs() -> None:
    runs = SharedRuns(13)
    texts = [np.arange(100 * n, 100 * n + 40) for n in range(60)]
    phrase = np.arange(9000, 9020)
    for each in texts:
        runs.add(np.concatenate([each, phrase]))
    runs.add(np.arange(5))
    runs.look(np.concatenate([np.arange(7000, 7005), texts[3][8:21], phrase]))  # 13 in a row, and a phrase of all
    runs.look(texts[5][:12])
    runs.look(np.concatenate([texts[6][:7], texts[6][8:20]]))
    assert runs.found() == [3]
    assert runs.short == 1


# --- what a run leaves out


def test_equal_documents(toy_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    rows = [row(1), row(2), row(1), row(3), row(2), row(1)]
    path = write(tmp_path / "rows.jsonl", rows)
    counted = prepared(toy_tokenizer, path)
    assert (len(counted.train), counted.report.duplicates) == (6, 3)
    left = prepared(toy_tokenizer, path, dataset_exact_deduplication=True)
    assert lines_of(left) == [1, 2, 4]
    assert (left.report.duplicates, left.report.train_documents, left.report.cache_hit) == (0, 3, True)
    assert left.fingerprint != counted.fingerprint
    said = "\n".join(left.report.lines())
    assert f"3 training documents left out, which are repeats of others; first: {path}:3 (as {path}:1)" in said
    assert "3 training documents left out, which repeat others" in "\n".join(data_facts(_run(left)))
    assert not any("left out, which" in line for line in counted.report.lines())


def _run(data: PreparedData) -> Any:
    class Run:
        pass

    run = Run()
    run.data = json.loads(json.dumps(data.report.describe()))  # type: ignore[attr-defined]
    return run


def test_other_labels_are_another_document(toy_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    ids = [5, 6, 7, 8]
    rows = [{"input_ids": ids, "labels": labels} for labels in (ids, [-100, -100, 7, 8], ids)]
    path = write(tmp_path / "rows.jsonl", rows)
    left = prepared(toy_tokenizer, path, type=None, dataset_exact_deduplication=True)
    assert lines_of(left) == [1, 2]


def test_between_datasets(toy_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    one = write(tmp_path / "one.jsonl", [row(1), row(2), row(1)])
    two = write(tmp_path / "two.jsonl", [row(2), row(3), row(1)])
    left = prepared(toy_tokenizer, one, two, dataset_exact_deduplication=True)
    assert left.report.repeats is not None
    assert left.report.repeats.between == [(str(one), str(one), 1), (str(two), str(one), 2)]
    assert f"1 of {one} in itself; 2 of {two} in {one}" in "\n".join(left.report.lines())


def test_validation_stays_whole(toy_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    near = row(4, output=text(1004).replace("ba", "ko", 1))
    train = write(tmp_path / "train.jsonl", [*map(row, range(12)), near])
    test = write(tmp_path / "test.jsonl", [row(4), row(7), row(7), row(50)])
    keys = {"test_datasets": [{"path": str(test), "type": "alpaca"}]}
    before = prepared(toy_tokenizer, train, **keys)
    assert (len(before.train), before.report.overlap) == (13, 3)
    exact, nearly = {"dataset_exact_deduplication": True}, {"dataset_near_deduplication": 0.6}
    for more, gone in ((exact, {5, 8}), (nearly, {5, 8, 13})):
        left = prepared(toy_tokenizer, train, **keys, **more)
        assert left.validation is not None and before.validation is not None
        assert np.array_equal(left.validation.digests, before.validation.digests)
        assert set(range(1, 14)) - set(lines_of(left)) == gone
        assert left.report.overlap == 0
        assert left.report.repeats is not None
        assert (left.report.repeats.contaminating.count, left.report.repeats.in_validation) == (2, 1)
        assert left.report.repeats.near_contaminating.count == len(gone) - 2
    assert f"(as {test}:1)" in "\n".join(left.report.lines())
    everything = write(tmp_path / "all.jsonl", [row(4), row(7)])
    with pytest.raises(DataError, match="nothing is left to train on: all 2 training documents are in the validation"):
        prepared(toy_tokenizer, everything, **keys, dataset_exact_deduplication=True)


def test_a_split_holds_out_the_same_rows(toy_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [row(n % 25) for n in range(50)])
    counted, left = (
        prepared(toy_tokenizer, path, val_set_size=10, dataset_exact_deduplication=on) for on in (False, True)
    )
    assert counted.validation is not None and left.validation is not None
    assert np.array_equal(counted.validation.rows, left.validation.rows)
    assert counted.report.overlap > 0
    assert not set(left.train.digests.tolist()) & set(left.validation.digests.tolist())
    assert len(set(left.train.digests.tolist())) == len(left.train)
    # What a checkpoint must agree on: the documents that are trained.
    assert not np.array_equal(counted.train.digests, left.train.digests)


def test_the_template_is_no_part_of_a_document(toy_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """Short questions with one answer, behind Alpaca's preamble: as wholes half of each is the same."""
    rows = [{"instruction": f"Is {random.Random(n).getrandbits(56):x}?", "output": "Yes."} for n in range(40)]
    path = write(tmp_path / "rows.jsonl", [*rows, rows[3]])
    whole = prepared(toy_tokenizer, path).train
    tokens = [shingles(whole[n].input_ids) for n in range(40)]
    assert sum(jaccard(tokens[n], tokens[n + 1]) > 0.5 for n in range(39)) > 20
    left = prepared(toy_tokenizer, path, dataset_near_deduplication=0.5)
    assert lines_of(left) == list(range(1, 41))


def test_same_passage_other_question(toy_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    passage, answer = text(1, 200), text(2, 40)
    changed = answer.replace(answer.split()[20], "xx", 1)
    asked = [
        row(0, f"{passage} Who?", answer),
        row(0, f"{passage} When?", text(3, 40)),
        row(0, f"{passage} Who?", changed),
        row(0, f"{passage} Who?", "No."),
    ]
    path = write(tmp_path / "rows.jsonl", asked)
    assert lines_of(prepared(toy_tokenizer, path, dataset_near_deduplication=0.75)) == [1, 2, 4]
    said = "\n".join(prepared(toy_tokenizer, path, dataset_near_deduplication=0.75).report.lines())
    assert "1 training documents left out, which are repeats of others, nearly (Jaccard 0.75)" in said


def test_pairs_and_labels(toy_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    pair = {"prompt": text(1, 30), "chosen": text(2, 40), "rejected": text(3, 40)}
    swapped = {**pair, "chosen": pair["rejected"], "rejected": pair["chosen"]}
    near = {**pair, "chosen": pair["chosen"] + " end"}
    path = write(tmp_path / "pairs.jsonl", [pair, swapped, near, pair, {**pair, "rejected": text(4, 40)}])
    keys: dict[str, Any] = {"type": None, "rl": "dpo"}
    assert lines_of(prepared(toy_tokenizer, path, **keys, dataset_exact_deduplication=True)) == [1, 2, 3, 5]
    assert lines_of(prepared(toy_tokenizer, path, **keys, dataset_near_deduplication=0.8)) == [1, 2, 5]
    answer = {"prompt": text(1, 30), "completion": text(2, 40), "label": True}
    labelled = [answer, {**answer, "label": False}, {**answer, "completion": answer["completion"] + " end"}]
    path = write(tmp_path / "labels.jsonl", labelled)
    left = prepared(toy_tokenizer, path, type=None, rl="kto", dataset_near_deduplication=0.8)
    assert lines_of(left) == [1, 2]


def test_shared_text_is_counted(toy_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    long = text(77, 60)
    train = write(tmp_path / "train.jsonl", [*map(row, range(20)), row(99, output=f"{text(98, 10)} {long}")])
    test = write(tmp_path / "test.jsonl", [row(n) for n in range(60, 80)] + [row(1, question=f"What is {long}?")])
    data = prepared(toy_tokenizer, train, test_datasets=[{"path": str(test), "type": "alpaca"}])
    assert data.report.repeats is not None
    # Row 1's own answer stands there with another question.
    assert (data.report.repeats.shared_text, data.report.overlap) == (1, 0)
    assert "1 of 21 validation documents have " in "\n".join(data.report.lines())


@pytest.mark.parametrize("value", [0.3, 1.5, "yes", True])
def test_bad_thresholds(value: Any) -> None:
    with pytest.raises(ConfigError, match="dataset_near_deduplication"):
        Config.from_flat({"base_model": "toy", "datasets": [{"path": "x"}], "dataset_near_deduplication": value})


def test_near_among_real_rows(alpaca_path: Path) -> None:
    """Near repeats among real rows, against comparing each with each, on 400 of them and edited copies."""
    with alpaca_path.open(encoding="utf-8") as file:
        rows = [json.loads(line) for line, _ in zip(file, range(400), strict=False)]
    texts = [f"{each['instruction']} {each['output']}".split() for each in rows]
    texts += [[*words[:-1], "elsewhere"] for words in texts[:200]]
    ids: dict[str, int] = {}
    values = [np.array([ids.setdefault(word, len(ids)) for word in words], np.uint64) for words in texts]
    sets = [shingles(value) for value in values]
    found = find_near(len(values), values.__getitem__, lambda a, b: jaccard(sets[a], sets[b]) >= 0.8, 0.8)
    wanted = {n for n in range(400, 600) if jaccard(sets[n], sets[n - 400]) >= 0.8}
    assert len(wanted) > 100
    assert len(wanted - set(found.twins)) <= 2
