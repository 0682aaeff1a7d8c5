"""Prepared data: the same from cache, from memory, in one process or several; every row kept or counted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from luthier.config import Config
from luthier.data import cache
from luthier.data.dataset import PreparedData, TokenDataset, prepare
from luthier.data.examples import TextExample
from luthier.data.formats import example_of
from luthier.data.report import TOO_LONG, UNTRAINED
from luthier.errors import DataError

ANSWERS = [{"instruction": f"Say {i}.", "output": " ".join(["word"] * (i % 7)) + str(i)} for i in range(40)]


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def config(path: Path | str, type: Any = "alpaca", **keys: Any) -> Config:
    entry = {"path": str(path), "type": type, **keys.pop("entry", {})}
    return Config.from_flat({"base_model": "toy", "sequence_len": 256, "datasets": [entry], **keys})


def documents(dataset: TokenDataset) -> list[tuple[list[int], list[int], tuple[int, ...] | None]]:
    found = [dataset[i] for i in range(len(dataset))]
    return [(doc.input_ids.tolist(), doc.labels.tolist(), doc.lengths) for doc in found]


def same(one: PreparedData, other: PreparedData) -> bool:
    reports = [{**p.report.describe(), "cache_hit": None, "seconds": None} for p in (one, other)]
    validation = [documents(p.validation) if p.validation else None for p in (one, other)]
    return (
        documents(one.train) == documents(other.train)
        and reports[0] == reports[1]
        and validation[0] == validation[1]
        and one.fingerprint == other.fingerprint
    )


def cache_folders() -> list[Path]:
    return sorted(Path(os.environ["LUTHIER_CACHE"]).iterdir())


def test_documents_are_prompt_answer_and_end(toy_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    prepared = prepare(config(write(tmp_path / "rows.jsonl", ANSWERS)), toy_tokenizer)
    data = prepared.train
    assert len(data) == 40
    entry = config("x").data.datasets[0]
    for i, row in enumerate(ANSWERS):
        example = example_of(row, entry, False)
        assert isinstance(example, TextExample)
        prompt = toy_tokenizer.encode(example.segments[0].text)
        answer = [*toy_tokenizer.encode(row["output"]), toy_tokenizer.eos_token_id]
        assert data[i].input_ids.tolist() == prompt + answer
        assert data[i].labels.tolist() == [-100] * len(prompt) + answer
        assert data[i].input_ids.dtype == data[i].labels.dtype == np.int32
        assert (data.lengths[i], data.trained[i]) == (len(prompt + answer), len(answer))
        assert data.location(i) == f"{tmp_path}/rows.jsonl:{i + 1}"
    report = prepared.report
    assert (report.rows, report.kept, report.tokens) == (40, 40, data.lengths.sum())
    assert (report.trained_tokens, report.longest) == (data.trained.sum(), data.lengths.max())
    assert sum(count for _, _, count in report.histogram) == 40


def test_first_tokens_are_never_trained(toy_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    text = prepare(
        config(write(tmp_path / "text.jsonl", [{"text": "hello"}]), "completion"), toy_tokenizer
    ).train
    assert text[0].labels[0] == -100
    assert text.trained[0] == text.lengths[0] - 1
    packed = {"input_ids": [5, 6, 7, 8], "labels": [5, 6, 7, 8], "segment_lengths": [1, 3]}
    rows = prepare(config(write(tmp_path / "tokens.jsonl", [packed]), None), toy_tokenizer).train
    assert documents(rows) == [([5, 6, 7, 8], [-100, -100, 7, 8], (1, 3))]
    assert rows.trained.tolist() == [2]


# --- the cache


def test_a_hit_is_the_same_as_a_miss(toy_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    rows = [*ANSWERS, {"instruction": "long", "output": "x " * 400}]
    wanted = config(write(tmp_path / "rows.jsonl", rows), val_set_size=0.1)
    first, second = prepare(wanted, toy_tokenizer), prepare(wanted, toy_tokenizer)
    assert (first.report.cache_hit, second.report.cache_hit) == (False, True)
    assert same(first, second)
    assert first.report.dropped[TOO_LONG].count == 1
    # Another split of the same tokens is a hit as well.
    assert prepare(wanted.replace("test", val_set_size=5), toy_tokenizer).report.cache_hit


def test_a_hit_parses_no_row(
    toy_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = config(write(tmp_path / "rows.jsonl", ANSWERS))
    prepare(wanted, toy_tokenizer)
    monkeypatch.setattr("luthier.data.files.object_of", lambda line: pytest.fail("a row was parsed"))
    assert len(prepare(wanted, toy_tokenizer).train) == 40


def test_what_changes_the_result_misses(toy_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    import copy

    path = write(tmp_path / "rows.jsonl", ANSWERS)
    wanted = config(path)
    prepare(wanted, toy_tokenizer)
    for changed in (
        config(path, sequence_len=100),
        config(path, train_on_inputs=True),
        config(path, excess_length_strategy="truncate"),
        config(path, entry={"field_system": "other"}),
        config(f"{path}#30"),
    ):
        assert not prepare(changed, toy_tokenizer).report.cache_hit
    grown = copy.deepcopy(toy_tokenizer)
    grown.add_tokens(["word"])
    assert not prepare(wanted, grown).report.cache_hit
    write(path, ANSWERS[:-1])
    assert not prepare(wanted, toy_tokenizer).report.cache_hit
    # What a call leaves behind in the tokenizer changes nothing.
    toy_tokenizer("some text", truncation=True, max_length=4, padding="max_length")
    assert prepare(wanted, toy_tokenizer).report.cache_hit
    toy_tokenizer("some text")


def test_template_files_are_part_of_the_key(toy_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    template = tmp_path / "template.jinja"
    template.write_text("A")
    wanted = config("x", "chat_template", entry={"chat_template": str(template)})
    before = cache.cache_key(wanted.data.datasets, ["f"], toy_tokenizer, wanted)
    template.write_text("B")
    assert cache.cache_key(wanted.data.datasets, ["f"], toy_tokenizer, wanted) != before


@pytest.mark.parametrize("name", ["input_ids.bin", "documents.npy", "meta.json", "parts.npy"])
def test_a_torn_cache_is_made_again(
    name: str, toy_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    wanted = config(write(tmp_path / "rows.jsonl", ANSWERS))
    first = prepare(wanted, toy_tokenizer)
    kept = documents(first.train)
    (folder,) = cache_folders()
    content = (folder / name).read_bytes()
    (folder / name).unlink()
    (folder / name).write_bytes(content[: len(content) // 2])
    second = prepare(wanted, toy_tokenizer)
    assert not second.report.cache_hit
    assert "cannot be used" in caplog.text
    assert documents(second.train) == kept
    assert prepare(wanted, toy_tokenizer).report.cache_hit
    assert cache_folders() == [folder]


def test_a_failed_start_leaves_nothing_behind(toy_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    with pytest.raises(DataError):
        prepare(config(write(tmp_path / "rows.jsonl", [*ANSWERS, {"instruction": "x"}])), toy_tokenizer)
    assert cache_folders() == []


def test_without_a_writable_cache_it_goes_on_in_memory(
    toy_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path / "rows.jsonl", ANSWERS)
    written = prepare(config(path), toy_tokenizer)
    (tmp_path / "file").write_text("in the way")
    kept = prepare(config(path, dataset_prepared_path=str(tmp_path / "file" / "cache")), toy_tokenizer)
    assert "cannot be written" in caplog.text
    assert same(written, kept)


def test_two_processes_at_once(
    toy_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = config(write(tmp_path / "rows.jsonl", ANSWERS))
    finish, others = cache.Writer.finish, []

    def late(writer: cache.Writer, meta: dict[str, Any]) -> cache.Store:
        monkeypatch.setattr(cache.Writer, "finish", finish)
        others.append(prepare(wanted, toy_tokenizer))  # somebody else is done before this one
        return finish(writer, meta)

    monkeypatch.setattr(cache.Writer, "finish", late)
    ours = prepare(wanted, toy_tokenizer)
    assert [ours.report.cache_hit, others[0].report.cache_hit] == [False, False]
    assert same(ours, others[0])
    assert len(cache_folders()) == 1


def test_a_full_disk_goes_on_in_memory(
    toy_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    wanted = config(write(tmp_path / "rows.jsonl", ANSWERS))

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache, "_sync", full)
    prepared = prepare(wanted, toy_tokenizer)
    assert "cannot be written (No space left on device)" in caplog.text
    assert len(prepared.train) == 40
    assert cache_folders() == []


# --- processes


def chats(count: int) -> list[dict[str, Any]]:
    return [
        {
            "messages": [
                {"role": "user", "content": f"Say {i}."},
                {"role": "assistant", "content": str(i) * (i % 5)},
            ]
        }
        for i in range(count)
    ]


def test_parallel_is_serial(
    toy_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("luthier.data.tokenise.CHUNK", 7)
    rows = chats(60)
    rows[20] = {"messages": []}
    rows[41] = {"messages": [{"role": "user", "content": "nobody answers"}]}
    path = write(tmp_path / "rows.jsonl", rows)
    results = []
    for count in (1, 2, None):
        keys = {"dataset_prepared_path": str(tmp_path / f"cache-{count}"), "dataset_processes": count}
        wanted = config(path, "chat_template", skip_bad_rows=True, val_set_size=6, **keys)
        results.append(prepare(wanted, toy_tokenizer))
    assert same(results[0], results[1])
    assert same(results[0], results[2])
    assert results[0].report.rows == 60
    assert results[0].report.kept == 58
    assert not results[1].report.cache_hit


def test_errors_come_from_processes_with_their_place(
    toy_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("luthier.data.tokenise.CHUNK", 7)
    rows = chats(60)
    rows[20] = rows[50] = {"messages": []}
    path = write(tmp_path / "rows.jsonl", rows)
    for count in (1, 2):
        with pytest.raises(DataError, match=r"rows.jsonl:21: `messages` has no message"):
            prepare(config(path, "chat_template", dataset_processes=count), toy_tokenizer)


def test_a_killed_process_is_one_message(
    toy_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if sys.platform != "linux":
        pytest.skip("only forked processes see the patched function")
    monkeypatch.setattr("luthier.data.tokenise.work", _die)
    path = write(tmp_path / "rows.jsonl", chats(5))
    with pytest.raises(DataError, match="most likely for want of memory"):
        prepare(config(path, "chat_template", dataset_processes=2), toy_tokenizer)


def _die(*_: Any) -> None:
    os._exit(9)


# --- lengths


def test_drop_truncate_raise(toy_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    rows = [
        ANSWERS[0],
        {"instruction": "long answer", "output": "x " * 300},
        {"instruction": "y " * 300, "output": "z"},
    ]
    path = write(tmp_path / "rows.jsonl", rows)
    dropped = prepare(config(path), toy_tokenizer)
    assert len(dropped.train) == 1
    assert dropped.report.dropped[TOO_LONG].count == 2
    assert dropped.report.dropped[TOO_LONG].first[0][0] == f"{path}:2"
    assert any(
        "2 (66.7%) left out: longer than sequence_len; first:" in line for line in dropped.report.lines()
    )
    cut = prepare(config(path, excess_length_strategy="truncate"), toy_tokenizer)
    assert cut.train.lengths.tolist() == [dropped.train.lengths[0], 256]
    assert cut.report.dropped[UNTRAINED].first == [
        (f"{path}:3", "what is left of it, 256 tokens, is all prompt")
    ]
    assert any("2 rows truncated to sequence_len" in line for line in cut.report.lines())
    with pytest.raises(DataError, match=r"rows.jsonl:2: \d+ tokens, and sequence_len is 256"):
        prepare(config(path, excess_length_strategy="raise"), toy_tokenizer)


def test_long_texts_are_split(toy_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    text = "".join(f"{i} words, " for i in range(300))
    path = write(tmp_path / "text.jsonl", [{"text": text}, {"text": "short"}])
    prepared = prepare(config(path, "completion"), toy_tokenizer)
    ids = [*toy_tokenizer.encode(text), toy_tokenizer.eos_token_id]
    joined = [token for document in documents(prepared.train)[:-1] for token in document[0]]
    assert joined == ids
    assert prepared.train.lengths[:-1].max() == 256
    assert prepared.train.rows.tolist() == [0] * (len(prepared.train) - 1) + [1]
    assert prepared.report.rows == 2
    assert any("1 texts split into documents of sequence_len" in line for line in prepared.report.lines())


@pytest.mark.parametrize(
    ("tokens", "expected"), [(8, [8]), (9, [7, 2]), (16, [8, 8]), (17, [8, 7, 2]), (18, [8, 8, 2])]
)
def test_no_piece_of_one_token(
    tokens: int, expected: list[int], toy_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    path = write(tmp_path / "text.jsonl", [{"text": "\t" * (tokens - 1)}])
    prepared = prepare(config(path, "completion", sequence_len=8), toy_tokenizer)
    assert prepared.train.lengths.tolist() == expected


def test_packed_rows_over_the_limit(toy_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    row = {"input_ids": list(range(5, 15)), "segment_lengths": [4, 6]}
    path = write(tmp_path / "tokens.jsonl", [row, {"input_ids": [5, 6]}])
    dropped = prepare(config(path, None, sequence_len=8), toy_tokenizer)
    assert dropped.report.dropped[TOO_LONG].first == [(f"{path}:1", "10 tokens")]
    cut = prepare(config(path, None, sequence_len=8, excess_length_strategy="truncate"), toy_tokenizer)
    assert documents(cut.train)[0][2] == (4, 4)
    # Shifted labels need no room of their own, but a document must not outgrow the model's positions.
    shifted = {"input_ids": list(range(5, 13)), "labels": list(range(6, 14))}
    split = {**shifted, "segment_lengths": [4, 4], "labels": [6, 7, 8, 3, 10, 11, 12, 3]}
    path = write(tmp_path / "shifted.jsonl", [shifted, split])
    back = prepare(config(path, None, sequence_len=8, entry={"labels_shifted": True}), toy_tokenizer)
    assert back.train.lengths.tolist() == [8, 10]
    assert any("labels behind the last position of sequence_len" in line for line in back.report.lines())


# --- nothing to train


@pytest.mark.parametrize(
    ("kind", "row", "why"),
    [
        ("alpaca", None, "there are no rows in it"),
        (
            "alpaca",
            {"instruction": "x " * 300, "output": "y"},
            "1 longer than sequence_len, first: .*rows.jsonl:1",
        ),
        (
            "input_output",
            {"segments": [{"label": False, "text": "x y z"}]},
            "none of them in a segment with `label: t",
        ),
        (
            "chat_template",
            {"messages": [{"role": "user", "content": "x"}]},
            "messages of user, where those of assist",
        ),
        (None, {"input_ids": [5, 6], "labels": [-100, -100]}, "its labels are -100 throughout"),
        (None, {"input_ids": [5]}, "the first one follows from nothing"),
    ],
)
def test_nothing_to_train_is_an_error(
    kind: str | None, row: Any, why: str, toy_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    path = write(tmp_path / "rows.jsonl", [row] if row else [])
    with pytest.raises(DataError, match=why):
        prepare(config(path, kind), toy_tokenizer)
    good = write(tmp_path / "good.jsonl", ANSWERS)
    both = [{"path": str(good), "type": "alpaca"}, {"path": str(path), "type": kind}]
    with pytest.raises(DataError, match=why):
        prepare(config(path).replace("test", datasets=both), toy_tokenizer)


def test_bad_rows_are_errors_or_counted(toy_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    good = json.dumps(ANSWERS[3])
    path.write_text(f'{good}\n{{"instruction": \n{good}\n{{"instruction": "x", "output": null}}\n{good}\n')
    with pytest.raises(DataError, match=r"rows.jsonl:2: not valid JSON: .*`skip_bad_rows: true` leaves"):
        prepare(config(path), toy_tokenizer)
    prepared = prepare(config(path, skip_bad_rows=True), toy_tokenizer)
    assert len(prepared.train) == 3
    lines = "\n".join(prepared.report.lines())
    assert "2 (40.0%) left out: bad row; first:" in lines
    assert ":4 (`output` is null; the row has the fields: instruction, output)" in lines


def test_foreign_token_ids(toy_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [{"input_ids": [5, 6]}, {"input_ids": [5, 6, 99999]}])
    with pytest.raises(DataError, match=r"rows.jsonl:2: `input_ids` holds 99999"):
        prepare(config(path, None), toy_tokenizer)


def test_odd_things_are_said(toy_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    rows = [
        {"instruction": "x", "output": "", "id": 1},
        {"instruction": "x", "output": "", "source": "web"},
        {"instruction": "see <|im_end|> here", "output": "y"},
    ]
    lines = "\n".join(prepare(config(write(tmp_path / "rows.jsonl", rows)), toy_tokenizer).report.lines())
    assert "2 empty answers, of which only the end is trained; first: " in lines
    assert "columns that are not read: id, source" in lines
    assert "1 training documents are repeats of others" in lines
    assert "rows.jsonl:3 (<|im_end|>)" in lines


# --- validation


def test_split_is_stable(toy_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", ANSWERS)

    def held(**keys: Any) -> set[int]:
        prepared = prepare(config(path, **keys), toy_tokenizer)
        assert prepared.validation is not None
        validation, train = set(prepared.validation.rows.tolist()), set(prepared.train.rows.tolist())
        assert not validation & train
        assert len(validation | train) == prepared.report.kept
        return validation

    assert len(held(val_set_size=0.25)) == len(held(val_set_size=10)) == 10
    assert held(val_set_size=10) == held(val_set_size=10, train_on_inputs=True)
    assert held(val_set_size=10) < held(val_set_size=20)
    assert held(val_set_size=10) != held(val_set_size=10, seed=7)
    # Rows that are dropped are replaced, the others stay.
    fewer = held(val_set_size=10, sequence_len=75)
    assert len(fewer) == 10
    dropped = set(range(40)) - set(prepare(config(path, sequence_len=75), toy_tokenizer).train.rows.tolist())
    assert 0 < len(dropped) < 30
    assert held(val_set_size=10) - dropped <= fewer
    for size in (40, 50):
        with pytest.raises(DataError, match=f"val_set_size: {size} would hold out"):
            held(val_set_size=size)


def test_pieces_of_a_text_stay_together(toy_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    path = write(tmp_path / "text.jsonl", [{"text": f"{i} words " * 60} for i in range(6)])
    prepared = prepare(config(path, "completion", sequence_len=32, val_set_size=2), toy_tokenizer)
    assert prepared.validation is not None
    assert len(prepared.validation) > 4
    assert not set(prepared.validation.rows) & set(prepared.train.rows)


def test_test_datasets_and_what_they_share(toy_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    train = write(tmp_path / "train.jsonl", ANSWERS[:30])
    test = write(tmp_path / "test.jsonl", ANSWERS[28:])
    wanted = config(train, test_datasets=[{"path": str(test), "type": "alpaca"}])
    prepared = prepare(wanted, toy_tokenizer)
    assert prepared.validation is not None
    assert (len(prepared.train), len(prepared.validation), prepared.report.overlap) == (30, 12, 2)
    assert any(
        "2 of 12 validation documents are in the training data" in line for line in prepared.report.lines()
    )
    assert prepare(wanted, toy_tokenizer).report.cache_hit


def test_subset(toy_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    data = prepare(config(write(tmp_path / "rows.jsonl", ANSWERS)), toy_tokenizer).train
    some = data.subset([7, 3]).subset([1, 0, 1])
    assert documents(some) == [documents(data)[i] for i in (3, 7, 3)]
    assert some.location(1) == data.location(7)
    with pytest.raises(IndexError):
        some[3]


def test_report_and_data_need_no_torch(tmp_path: Path) -> None:
    modules = "luthier.data.formats, luthier.data.readers, luthier.data.report, luthier.data.preview"
    code = f"import sys, {modules}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
