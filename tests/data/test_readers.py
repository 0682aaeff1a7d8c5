"""Reading rows: every kind of file, where each row came from, and what is said when something is wrong."""

from __future__ import annotations

import gzip
import json
import logging
from pathlib import Path
from typing import Any

import pytest

from luthier.config import DatasetEntry
from luthier.data.readers import Rows, open_rows
from luthier.errors import ConfigError, DataError

ROWS = [{"text": "one"}, {"text": "two\u2028lines"}, {"text": "next\u0085line"}, {"text": "four \U0001f600"}]


def rows_of(path: Path | str, **keys: Any) -> list[tuple[str, dict[str, Any]]]:
    return list(open_rows(DatasetEntry(path=str(path), **keys)))


def texts(path: Path | str, **keys: Any) -> list[str]:
    return [row["text"] for _, row in rows_of(path, **keys)]


def jsonl(path: Path, rows: list[Any], ascii_only: bool = False, end: str = "\n") -> Path:
    lines = [json.dumps(row, ensure_ascii=ascii_only) for row in rows]
    path.write_bytes("".join(line + end for line in lines).encode())
    return path


# --- JSON


def test_lines_end_at_newlines_only(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "rows.jsonl", ROWS)
    assert rows_of(path) == [(f"{path}:{line}", row) for line, row in enumerate(ROWS, start=1)]


def test_windows_ends_blank_lines_and_no_last_newline(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\r\n{"text": "one"}\r\n\r\n  \n{"text": "two"}')
    assert rows_of(path) == [(f"{path}:2", {"text": "one"}), (f"{path}:5", {"text": "two"})]


def test_byte_order_mark_is_left_out_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name, content in (
        ("a.jsonl", '{"text": "x"}\n'),
        ("a.csv", "text\nx\n"),
        ("a.json", '[{"text": "x"}]'),
    ):
        path = tmp_path / name
        path.write_bytes(b"\xef\xbb\xbf" + content.encode())
        with caplog.at_level(logging.INFO, "luthier"):
            assert texts(path) == ["x"]
        assert f"{path} begins with a byte order mark" in caplog.text
    (tmp_path / "b.jsonl").write_text('{"text": "x"}', "utf-16")
    with pytest.raises(DataError, match=r"UTF-16"):
        texts(tmp_path / "b.jsonl")


def test_arrays_and_lines_are_told_apart_by_content(tmp_path: Path) -> None:
    array = tmp_path / "array.json"
    array.write_text(json.dumps(ROWS, indent=2, ensure_ascii=False), "utf-8")
    assert rows_of(array) == [(f"{array}:{2 + 3 * i}", row) for i, row in enumerate(ROWS)]
    assert texts(jsonl(tmp_path / "lines.json", ROWS)) == [row["text"] for row in ROWS]
    compact = tmp_path / "array.jsonl"
    compact.write_text(json.dumps(ROWS))
    assert texts(compact) == [row["text"] for row in ROWS]
    spread = tmp_path / "spread.json"
    spread.write_text("\n\n".join(json.dumps(row, indent=1) for row in ROWS[:2]))
    assert rows_of(spread) == [(f"{spread}:1", ROWS[0]), (f"{spread}:5", ROWS[1])]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (b'{"text": "x", }', "not valid JSON: .* \\(column 1[45]\\)"),
        (b'{"text": "\xff"}', "not valid UTF-8"),
        (b'["text"]', "must be a JSON object with named fields, and this is a list"),
        (b'"text"', "and this is a string"),
        (b"null", "and this is null"),
        (b"17", "and this is a number"),
        (b'{"text": ["a"], "more": ["b"]}', "holds whole columns"),
    ],
)
def test_a_bad_line_is_named_and_costs_only_itself(tmp_path: Path, bad: bytes, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "one"}\n' + bad + b'\n{"text": "three"}\n')
    with pytest.raises(DataError, match=message) as caught:
        rows_of(path)
    assert str(caught.value).startswith(f"{path}:2: ")
    scanned = list(open_rows(DatasetEntry(path=str(path))).scan())
    assert [isinstance(row, DataError) for _, row in scanned] == [False, True, False]


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ('[{"text": 1},\n{"text": }\n]', 2),
        ('[{"text": 1},\n {"text": 2}', 2),
        ('[{"text": 1}\n\n{"text": 2}]', 3),
        ('[{"text": 1}]\n{"text": 2}', 2),
        ('{\n"text": 1,,\n}', 2),
    ],
)
def test_a_broken_array_is_named_by_line(tmp_path: Path, content: str, line: int) -> None:
    path = tmp_path / "rows.json"
    path.write_text(content)
    with pytest.raises(DataError, match=r"not valid JSON") as caught:
        list(open_rows(DatasetEntry(path=str(path))).scan())
    assert str(caught.value).startswith(f"{path}:{line}: ")


def test_compressed_lines(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    content = jsonl(tmp_path / "plain.jsonl", ROWS).read_bytes()
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(content))
    with pa.CompressedOutputStream(str(tmp_path / "rows.jsonl.zst"), "zstd") as file:
        file.write(content)
    for name in ("rows.jsonl.gz", "rows.jsonl.zst"):
        assert texts(tmp_path / name) == [row["text"] for row in ROWS]
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(content)[:-12])
    with pytest.raises(DataError, match=r"cut.jsonl.gz"):
        texts(tmp_path / "cut.jsonl.gz")


# --- CSV


def test_csv_cells_stay_text_and_may_hold_newlines(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(b'id,text\r\n007,"a, ""b""\nc"\r\n\r\ntrue,\r\nNA,3.50\n')
    assert rows_of(path) == [
        (f"{path}:2", {"id": "007", "text": 'a, "b"\nc'}),
        (f"{path}:5", {"id": "true", "text": ""}),
        (f"{path}:6", {"id": "NA", "text": "3.50"}),
    ]
    tabs = tmp_path / "rows.tsv"
    tabs.write_text("id\ttext\n1\ta, b\n")
    assert rows_of(tabs) == [(f"{tabs}:2", {"id": "1", "text": "a, b"})]


def test_bad_csv(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("a,b\n1,2\n1,2,3\n4,5\n")
    with pytest.raises(DataError, match=r":3: 3 cells, where the header has 2"):
        rows_of(path)
    assert (
        len([row for _, row in open_rows(DatasetEntry(path=str(path))).scan() if isinstance(row, dict)]) == 2
    )
    path.write_text("a,a\n1,2\n")
    with pytest.raises(DataError, match=r":1: the header names a column twice: 'a'"):
        rows_of(path)
    path.write_text('a,b\n1,"2\n')
    with pytest.raises(DataError, match=r"not valid CSV"):
        rows_of(path)
    path.write_bytes(b"a,b\n1,\xff\n")
    with pytest.raises(DataError, match=r":2: not valid UTF-8"):
        rows_of(path)


# --- columnar files


def test_parquet_and_both_arrow_formats(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    rows = [
        {"text": "one", "tags": [{"a": 1, "b": None}], "n": None},
        {"text": "two", "tags": [{"a": None, "b": 2}], "n": 3},
    ]
    table = pa.Table.from_pylist(rows)
    pq.write_table(table, tmp_path / "rows.parquet")
    with pa.ipc.new_file(tmp_path / "file.arrow", table.schema) as writer:
        writer.write_table(table)
    with pa.ipc.new_stream(tmp_path / "stream.arrow", table.schema) as writer:
        writer.write_table(table)
    for name in ("rows.parquet", "file.arrow", "stream.arrow"):
        path = tmp_path / name
        # Nulls of columns stay; the fields that Arrow adds to objects do not.
        assert rows_of(path) == [
            (f"{path}:1", {"text": "one", "tags": [{"a": 1}], "n": None}),
            (f"{path}:2", {"text": "two", "tags": [{"b": 2}], "n": 3}),
        ]
        path.write_bytes(b"not it")
        with pytest.raises(DataError, match=name):
            rows_of(path)


def test_folders_of_save_to_disk(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    one = datasets.Dataset.from_list([{"text": str(i)} for i in range(5)])
    one.select([3, 1]).save_to_disk(tmp_path / "single")
    assert texts(tmp_path / "single") == ["3", "1"]
    datasets.DatasetDict({"train": one, "test": one.select([4])}).save_to_disk(tmp_path / "both")
    assert texts(tmp_path / "both") == list("01234")
    assert texts(tmp_path / "both", split="test") == ["4"]
    with pytest.raises(DataError, match=r"no split `dev` in this dataset. Splits there: train, test"):
        texts(tmp_path / "both", split="dev")


# --- finding files


def test_folder_in_sorted_order_without_hidden_files(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    jsonl(tmp_path / "b.jsonl", [{"text": "b"}])
    (tmp_path / "a.csv").write_text("text\na\n")
    (tmp_path / "sub").mkdir()
    jsonl(tmp_path / "sub" / "c.json", [{"text": "c"}])
    (tmp_path / ".cache").mkdir()
    jsonl(tmp_path / ".cache" / "x.jsonl", [{"text": "x"}])
    jsonl(tmp_path / ".x.jsonl", [{"text": "x"}])
    (tmp_path / "README.md").write_text("read me")
    with caplog.at_level(logging.INFO, "luthier"):
        assert texts(tmp_path) == ["a", "b", "c"]
    assert "1 other file(s) in the folder are not data: README.md" in caplog.text
    assert texts(tmp_path, data_files="*.jsonl") == ["b"]
    assert texts(tmp_path, data_files=["sub/*.json", "a.csv", "a.*"]) == ["c", "a"]
    assert texts("json", data_files=str(tmp_path / "b.jsonl"), split="train") == ["b"]
    assert texts(tmp_path / "*.jsonl") == ["b"]


def test_splits_by_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("train-00000-of-00001", "test-00000-of-00001", "extra"):
        jsonl(tmp_path / f"{name}.jsonl", [{"text": name}])
    assert texts(tmp_path) == ["train-00000-of-00001"]
    assert "left out, for their names: extra.jsonl, test-00000-of-00001.jsonl" in caplog.text
    assert texts(tmp_path, split="test") == ["test-00000-of-00001"]
    with pytest.raises(DataError, match=r"no file of split `dev` in this folder. Splits there: test, train"):
        texts(tmp_path, split="dev")


def test_counts_and_slices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = jsonl(tmp_path / "rows.jsonl", [{"text": str(i)} for i in range(10)])
    assert texts(f"{path}#3") == ["0", "1", "2"]
    assert texts(f"{path}#30") == [str(i) for i in range(10)]
    assert texts(path, split="train[2:5]") == ["2", "3", "4"]
    assert texts(f"{path}#2", split="train[2:5]") == ["2", "3"]
    with pytest.raises(ConfigError, match=r"takes no row at all"):
        texts(f"{path}#0")
    with pytest.raises(DataError, match=r"all of which is the split `train`"):
        texts(path, split="test")
    monkeypatch.chdir(tmp_path)
    assert len(texts("rows.jsonl")) == 10
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(texts("~/rows.jsonl")) == 10


def test_what_is_missing_says_where_it_was_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jsonl(tmp_path / "alpaca.jsonl", ROWS)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"looked for .*/alpacca.jsonl\. There is: alpaca.jsonl"):
        open_rows(DatasetEntry(path="alpacca.jsonl"))
    with pytest.raises(DataError, match=r"There is: alpaca.jsonl"):
        open_rows(DatasetEntry(path="./alpaca.parquet"))
    with pytest.raises(DataError, match=r"The folder .* is there, what the path names inside of it is not"):
        open_rows(DatasetEntry(path="./data/deep/alpaca.jsonl"))
    with pytest.raises(DataError, match=r"data_files: \*.csv: no file matches"):
        open_rows(DatasetEntry(path=str(tmp_path), data_files="*.csv"))
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(DataError, match=r"does not say what is in it"):
        open_rows(DatasetEntry(path="./notes.txt"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no data files in this folder"):
        open_rows(DatasetEntry(path="empty"))


def test_hub_ids_without_a_network_are_one_message() -> None:
    pytest.importorskip("datasets")
    with pytest.raises(DataError, match=r"someone/some-data: neither a file or folder here .* nor a dataset"):
        open_rows(DatasetEntry(path="someone/some-data"))


def test_hub_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    asked: list[Any] = []

    def load_dataset(*args: Any, **keys: Any) -> Any:
        asked.append((args, keys))
        messages = [[{"role": "user", "content": "x"}], [{"role": "tool", "name": "f"}]]
        return datasets.Dataset.from_dict({"text": ["a", "b"], "messages": messages})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    entry = DatasetEntry(
        path="someone/data#5", name="en", split="test[:10%]", revision="v1", data_files="x.json"
    )
    rows = open_rows(entry)
    assert list(rows) == [
        ("someone/data:1", {"text": "a", "messages": [{"role": "user", "content": "x"}]}),
        ("someone/data:2", {"text": "b", "messages": [{"role": "tool", "name": "f"}]}),
    ]
    assert asked == [
        (("someone/data", "en"), {"split": "test[:10%]", "revision": "v1", "data_files": "x.json"})
    ]
    assert open_rows(entry).fingerprint == rows.fingerprint


def test_keys_of_hub_datasets_do_nothing_here(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "rows.jsonl", ROWS)
    with pytest.raises(ConfigError, match=r"revision: v1: only a hub dataset has one"):
        open_rows(DatasetEntry(path=str(path), revision="v1"))


# --- fingerprints


def test_fingerprints_follow_the_content(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "rows.jsonl", ROWS)

    def fingerprint(name: str = str(path)) -> str:
        return open_rows(DatasetEntry(path=name)).fingerprint

    before = fingerprint()
    assert before == fingerprint() != fingerprint(f"{path}#2")
    path.touch()
    assert fingerprint() == before
    jsonl(path, [*ROWS[:-1], {"text": "other"}])
    assert fingerprint() != before


def test_take_is_the_first_rows(tmp_path: Path) -> None:
    rows: Rows = open_rows(DatasetEntry(path=str(jsonl(tmp_path / "rows.jsonl", ROWS))))
    assert [row for _, row in rows.take(2)] == ROWS[:2]
    assert [row for _, row in rows.take(2).take(3)] == ROWS[:2]


# --- real files


def test_real_rows_that_lines_must_not_be_split_on(shared_data: Path, tmp_path: Path) -> None:
    train = rows_of(shared_data / "gsm8k_train.jsonl")
    assert len(train) == 7473
    assert "\u2028" in json.dumps(train[2381][1], ensure_ascii=False)
    again = jsonl(tmp_path / "again.jsonl", [row for _, row in train])
    assert len(again.read_text("utf-8").splitlines()) > 7473
    assert [row for _, row in rows_of(again)] == [row for _, row in train]
    questions = rows_of(shared_data / "mmlu_pro_test.jsonl")
    assert len(questions) == 12032
    assert sum("\u0085" in json.dumps(row, ensure_ascii=False) for _, row in questions) == 1


def test_real_parquet_answers_stay_text(shared_data: Path) -> None:
    rows = rows_of(shared_data / "gsm8k_train_problem_answer.parquet")
    answers = [row["answer"] for _, row in rows]
    assert len(answers) == 7473
    assert all(isinstance(answer, str) for answer in answers)
    assert sum("," in answer for answer in answers) == 79
