"""The demo's instruction data: reproducible, right, and held out."""

from __future__ import annotations

import json
import re
from importlib import resources
from itertools import pairwise
from pathlib import Path

from luthier.demo import tasks, words

SHIPPED = resources.files("luthier.demo") / "data"


def rows(name: str) -> list[dict[str, str]]:
    text = (SHIPPED / f"{name}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_the_shipped_files_are_the_scripts_output_to_the_byte(tmp_path: Path) -> None:
    tasks.write(tmp_path)
    for name in ("train.jsonl", "test.jsonl"):
        assert (tmp_path / name).read_bytes() == (SHIPPED / name).read_bytes(), name


def test_the_seed_decides_which_rows_are_held_out() -> None:
    assert tasks.make_rows(1) == tasks.make_rows(1)
    assert tasks.make_rows(1)[1] != tasks.make_rows(2)[1]


def test_no_held_out_item_is_trained_on_in_any_wording() -> None:
    asked = [(row["instruction"], row["input"]) for row in rows("train") + rows("test")]
    assert len(set(asked)) == len(asked)
    home = {
        (task, question): number
        for task, make in tasks.TASKS.items()
        for number, item in enumerate(make())
        for question in item.questions
    }
    trained, held_out = (
        {(row["task"], home[row["task"], (row["instruction"], row["input"])]) for row in rows(name)}
        for name in ("train", "test")
    )
    assert not trained & held_out


def test_every_kind_is_there_in_both_files() -> None:
    for name, least in (("train", 80), ("test", tasks.TEST_ROWS_PER_TASK)):
        kinds = [row["task"] for row in rows(name)]
        assert {task: kinds.count(task) >= least for task in tasks.TASKS} == dict.fromkeys(tasks.TASKS, True)
    assert len(rows("train")) > 2000


def test_the_answers_are_right() -> None:
    tables = {
        "plurals": words.PLURALS,
        "opposites": words.OPPOSITES,
        "young": words.YOUNG,
        "kinds": words.KINDS,
    }
    for row in rows("train") + rows("test"):
        text = f"{row['instruction']} {row['input']}"
        if row["task"] in ("fibonacci", "sequence"):
            line = [int(number) for number in re.findall(r"\d+", f"{text} {row['output']}")]
            if row["task"] == "fibonacci":
                assert all(a + b == c for a, b, c in zip(line, line[1:], line[2:], strict=False)), row
            else:
                assert len({b - a for a, b in pairwise(line)}) == 1, row
        elif row["task"] == "counting":
            assert row["output"] == str(len(row["input"].split(", "))), row
        elif row["task"] == "calendar":
            word = next(w for w in words.DAYS + words.MONTHS if re.search(rf"\b{w}\b", text))
            assert row["output"] == words.neighbour(word, 1 if " after " in text else -1), row
        else:
            table = tables[row["task"]]
            assert row["output"] in {table[word] for word in re.findall(r"\w+", text) if word in table}, row
