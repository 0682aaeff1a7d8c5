"""The demo's instruction data: reproducible, right, and held out."""

from __future__ import annotations

import json
from importlib import resources
from itertools import pairwise
from pathlib import Path

from luthier.demo import tasks, words

SHIPPED = resources.files("luthier.demo") / "data"


def rows(name: str) -> list[dict[str, str]]:
    text = (SHIPPED / f"{name}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_the_shipped_files_are_the_scripts_output_to_the_byte(tmp_path: Path):
    tasks.write(tmp_path)
    for name in ("train.jsonl", "test.jsonl"):
        assert (tmp_path / name).read_bytes() == (SHIPPED / name).read_bytes(), name


def test_another_seed_makes_other_rows():
    small = {"train_per_task": 20, "test_per_task": 5}
    assert tasks.make_rows(1, **small) == tasks.make_rows(1, **small)
    assert tasks.make_rows(1, **small) != tasks.make_rows(2, **small)


def test_no_held_out_question_is_trained_on():
    train, test = rows("train"), rows("test")
    asked = [(row["instruction"], row["input"]) for row in train + test]
    assert len(set(asked)) == len(asked)
    # Nor in other words: where the input holds the question, the input itself is new.
    trained = {(row["task"], row["input"]) for row in train if row["task"] not in ("backwards", "lookup")}
    assert not [row for row in test if (row["task"], row["input"]) in trained]
    # A word that is spelt, and the end of a sequence, occur on one side only.
    for task in ("backwards", "fibonacci", "sequence"):
        outputs = [{row["output"] for row in part if row["task"] == task} for part in (train, test)]
        assert not outputs[0] & outputs[1], task


def test_every_kind_is_there_in_both_files():
    for name, least in (("train", 200), ("test", tasks.TEST_ROWS_PER_TASK)):
        kinds = [row["task"] for row in rows(name)]
        assert {task: kinds.count(task) >= least for task in tasks.TASKS} == dict.fromkeys(tasks.TASKS, True)
    assert len(rows("train")) > 2000


def test_the_answers_are_right():
    for row in rows("train") + rows("test"):
        given, answer = row["input"].split(", "), row["output"].split(", ")
        match row["task"]:
            case "fibonacci":
                line = [int(number) for number in given + answer]
                assert all(a + b == c for a, b, c in zip(line, line[1:], line[2:], strict=False)), row
            case "sequence":
                line = [int(number) for number in given + answer]
                assert len({b - a for a, b in pairwise(line)}) == 1, row
            case "backwards":
                word = row["output"].replace(" ", "")[::-1]
                assert f" {word} " in row["instruction"], row
            case "sorting":
                assert answer == sorted(given), row
            case "counting":
                assert row["output"] == str(len(given)), row
            case "opposites":
                assert [words.OPPOSITES[word] for word in given] == answer, row
            case "plurals":
                assert [words.PLURALS[word] for word in given] == answer, row
            case "lookup":
                assert row["output"] in row["input"].rstrip(".").replace(",", "").split(), row


def test_the_fibonacci_sequence_is_there_in_both_forms():
    """The classical one, and rows that begin otherwise."""
    classical = {1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144, 233, 377}
    found = [
        {int(number) for number in f"{row['input']}, {row['output']}".split(", ")} <= classical
        for row in rows("train")
        if row["task"] == "fibonacci"
    ]
    assert sum(found) > 2
    assert len(found) > 200
