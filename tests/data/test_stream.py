"""Streams: the same rows as reading whole, from any place on; blocks whose steps follow from where they begin."""

from __future__ import annotations

import gzip
import http.server
import json
import logging
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from luthier.config import Config, DatasetEntry
from luthier.data.readers import open_rows
from luthier.data.stream import blocks, files
from luthier.data.stream.loader import StreamLoader
from luthier.data.stream.mix import Mix
from luthier.data.stream.prepare import prepare
from luthier.data.stream.sources import open_source
from luthier.errors import ConfigError, DataError, RunError

Rows = list[dict[str, Any]]
ROWS: Rows = [{"text": f"row {n} " + "ä\u2028b " * (n % 7), "n": n} for n in range(2500)]


def write_rows(path: Path, rows: Rows, kind: str) -> Path:
    """The rows as one file of a kind: jsonl, jsonl.gz, csv, parquet, arrow, arrows (Arrow's stream format)."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = path / f"rows.{kind.removesuffix('s')}"
    text = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n"
    table = pa.Table.from_pylist(rows)
    if kind == "jsonl":
        file.write_text("\ufeff" + text)
    elif kind == "jsonl.gz":
        file.write_bytes(gzip.compress(text.encode()))
    elif kind == "jsonl.zst":
        with pa.CompressedOutputStream(str(file), "zstd") as out:
            out.write(text.encode())
    elif kind == "csv":
        import csv

        with file.open("w", newline="") as out:
            writer = csv.DictWriter(out, list(rows[0]))
            writer.writeheader()
            writer.writerows({**row, "text": row["text"].replace("b", "\n")} for row in rows)
    elif kind == "parquet":
        pq.write_table(table, file, row_group_size=700)
    else:
        new = pa.ipc.new_file if kind == "arrow" else pa.ipc.new_stream
        with new(str(file), table.schema) as writer:
            writer.write_table(table, max_chunksize=600)
    return file


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "jsonl.zst", "csv", "parquet", "arrow", "arrows"])
def test_a_source_gives_the_rows_of_reading_whole_from_any_position(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    file = write_rows(folder, ROWS, kind)
    (folder / f"z-{file.name}").write_bytes(file.read_bytes())  # the positions go on over files
    entry = DatasetEntry(path=str(folder), split="train[3:4000]")
    expected = list(open_rows(entry).scan())
    assert len(expected) == 3997
    source = open_source(entry)
    assert list(source.begin(None)) == expected
    for stop in (0, 1, 699, 700, 1000, 2497, 2498, 3996, 3997):
        cursor = source.begin(None)
        rows = iter(cursor)
        head = [next(rows) for _ in range(stop)]
        position = json.loads(json.dumps(cursor.position()))
        assert head + list(source.begin(position)) == expected


def test_what_was_read_of_a_text_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain text is sought; of packed text, nothing is parsed."""
    parsed = []
    object_of = files.object_of
    monkeypatch.setattr(files, "object_of", lambda line: (parsed.append(line), object_of(line))[1])
    read = []
    monkeypatch.setattr(files, "text_start", lambda line, path: (read.append(line), line)[1])
    for kind in ("jsonl", "jsonl.gz"):
        source = open_source(DatasetEntry(path=str(write_rows(tmp_path, ROWS, kind))))
        cursor = source.begin(None)
        for _ in zip(range(2000), cursor, strict=False):
            pass
        parsed.clear()
        read.clear()
        assert len(list(source.begin(cursor.position()))) == 500
        assert len(parsed) == 500 and not read


def test_bad_rows_and_files_that_are_no_streams(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'{"a": 1}\n{"a": \n\xff\n[1]\n{"a": 2}')
    entry = DatasetEntry(path=str(file))
    read, whole = list(open_source(entry).begin(None)), list(open_rows(entry).scan())
    assert [(place, str(row)) for place, row in read] == [(place, str(row)) for place, row in whole]
    for name, content, says in (
        ("a.json", '[\n{"a": 1}]', "is a JSON array.*jq"),
        ("b.jsonl", '[{"a": 1}]', "is a JSON array"),
        ("c.json", '{\n"a": 1}', "objects that span lines.*one object per line"),
        ("d.jsonl.gz", "no gzip", "[Nn]ot a (complete )?gzip"),
        ("e.parquet", "no parquet", "not a readable Parquet file"),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(DataError, match=says):
            list(open_source(DatasetEntry(path=str(tmp_path / name))).begin(None))
    with pytest.raises(DataError, match="there is no such file"):
        open_source(DatasetEntry(path=str(tmp_path / "none.jsonl")))
    cursor = open_source(entry).begin(None)
    list(cursor)
    file.write_text('{"a": 1}\n')
    with pytest.raises(DataError, match="has 9 bytes, and was read up to byte"):
        list(open_source(entry).begin({"rows": 5, "file": 0, "place": {"row": 5, "line": 5, "byte": 30}}))


# --- addresses ----------------------------------------------------------------------------------------------


@pytest.fixture
def memory() -> Iterator[Any]:
    import fsspec

    system = fsspec.filesystem("memory")
    yield system
    system.store.clear()


def test_addresses_are_read_as_they_are_without_a_copy(memory: Any, tmp_path: Path) -> None:
    for n, kind in enumerate(("jsonl", "jsonl.gz", "parquet", "arrow")):
        file = write_rows(tmp_path, ROWS, kind)
        memory.pipe(f"/bucket/{n}/{file.name}", file.read_bytes())
        source = open_source(DatasetEntry(path=f"memory://bucket/{n}"))
        cursor = source.begin(None)
        rows = iter(cursor)
        head = [next(rows)[1] for _ in range(1200)]
        tail = [row for _, row in source.begin(cursor.position())]
        expected = [row for _, row in open_rows(DatasetEntry(path=str(file))).scan()]
        assert head + tail == expected
        assert source.stamps[0].size == file.stat().st_size
    found = open_source(DatasetEntry(path="memory://bucket/*/rows.jsonl*"))
    assert [stamp.path.rsplit("/", 1)[1] for stamp in found.stamps] == ["rows.jsonl", "rows.jsonl.gz"]
    assert len(list(open_source(DatasetEntry(path="memory://bucket/2#10")).begin(None))) == 10


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("memory://bucket/none.jsonl", "there is no such file"),
        ("http://127.0.0.1:1/rows.jsonl", "there is no such file.*, or the server does not answer"),
        ("memory://bucket/text.txt", "the name does not say what is in it"),
        ("nosuch://bucket/rows.jsonl", "Protocol not known|nosuch"),
    ],
)
def test_addresses_with_nothing_to_read(memory: Any, path: str, says: str) -> None:
    memory.pipe("/bucket/text.txt", b"text")
    with pytest.raises(DataError, match=says):
        open_source(DatasetEntry(path=path))


def test_a_missing_driver_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    def missing(*arguments: Any, **options: Any) -> Any:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    for scheme, extra in (("s3", "s3"), ("gs", "gcs"), ("abfs", "azure")):
        with pytest.raises(DataError, match=rf"pip install 'luthier\[{extra}\]'"):
            open_source(DatasetEntry(path=f"{scheme}://bucket/rows.jsonl"))


class _Handler(http.server.SimpleHTTPRequestHandler):
    """A server of files; with `ranges`, of parts of them too."""

    ranges = False

    def log_message(self, *arguments: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            self.send_error(404)
            return
        content, asked = path.read_bytes(), self.headers.get("Range")
        first, last = 0, len(content) - 1
        if self.ranges and asked:
            low, high = asked.removeprefix("bytes=").split("-")
            first, last = int(low), min(last, int(high))
        self.send_response(206 if self.ranges and asked else 200)
        if self.ranges:
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
        self.send_header("Content-Length", str(last + 1 - first))
        self.send_header("ETag", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content[first : last + 1])


@pytest.mark.parametrize("ranges", [True, False])
def test_a_web_server_is_read_whether_it_gives_parts_or_not(tmp_path: Path, ranges: bool) -> None:
    write_rows(tmp_path, ROWS, "jsonl")
    handler = type("Handler", (_Handler,), {"ranges": ranges})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(tmp_path))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            address = f"http://127.0.0.1:{server.server_port}"
            source = open_source(DatasetEntry(path=f"{address}/rows.jsonl"))
            assert source.stamps[0].version == str((tmp_path / "rows.jsonl").stat().st_size)
            cursor = source.begin(None)
            head = [row for _, (_, row) in zip(range(2000), cursor, strict=False)]
            assert head + [row for _, row in source.begin(cursor.position())] == ROWS
            with pytest.raises(DataError, match=r"none.jsonl: (there is no such file|cannot be read)"):
                open_source(DatasetEntry(path=f"{address}/none.jsonl"))
        finally:
            server.shutdown()
            thread.join()


def test_an_address_needs_streaming() -> None:
    with pytest.raises(ConfigError, match="streaming: true"):
        open_rows(DatasetEntry(path="s3://bucket/rows.jsonl"))


def test_a_hub_dataset_is_streamed_by_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which says where it stands."""
    import datasets

    load = datasets.load_dataset
    asked: list[Any] = []

    def local(name: str, subset: str | None, **options: Any) -> Any:
        asked.append((name, subset, options["split"], options["revision"], options["streaming"]))
        return load("json", data_files=[str(tmp_path / f"{n}.jsonl") for n in range(3)], split="train", streaming=True)

    monkeypatch.setattr(datasets, "load_dataset", local)
    monkeypatch.setattr("luthier.data.stream.sources.notice_missing_network", lambda: None)
    for n in range(3):
        (tmp_path / f"{n}.jsonl").write_text("".join(json.dumps({"n": 100 * n + k}) + "\n" for k in range(100)))
    source = open_source(DatasetEntry(path="some/data#250", name="sub", split="train[7:]", revision="v1"))
    expected = [(f"some/data:{n + 1}", {"n": n}) for n in range(7, 257)]
    assert list(source.begin(None)) == expected
    assert asked == [("some/data", "sub", "train", "v1", True)]
    for stop in (0, 1, 92, 93, 150, 249, 250):
        cursor = source.begin(None)
        rows = iter(cursor)
        head = [next(rows) for _ in range(stop)]
        assert head + list(source.begin(json.loads(json.dumps(cursor.position())))) == expected
    with pytest.raises(ConfigError, match="count rows"):
        open_source(DatasetEntry(path="some/data", split="train[:10%]"))


# --- several sources ----------------------------------------------------------------------------------------


def sources_of(tmp_path: Path, *sizes: int) -> list[Any]:
    made = []
    for number, size in enumerate(sizes):
        file = tmp_path / f"{number}.jsonl"
        file.write_text("".join(f'{{"n": {n}}}\n' for n in range(size)))
        made.append(open_source(DatasetEntry(path=str(file))))
    return made


def test_interleaved_shares_hold_at_every_point_and_each_source_begins_again(tmp_path: Path) -> None:
    weights = [1.0, 2.5, 0.5]
    mix = Mix(sources_of(tmp_path, 40, 30, 100), [None] * 3, weights)
    seen: list[list[int]] = [[], [], []]
    for count in range(1, 900):
        index, _, row = mix.next()  # type: ignore[misc]
        seen[index].append(row["n"])  # type: ignore[index]
        for one, weight in zip(seen, weights, strict=True):
            assert abs(len(one) - count * weight / sum(weights)) <= 1
        if count % 97 == 0:  # and it goes on from anywhere
            position = json.loads(json.dumps(mix.position()))
            mix = Mix(sources_of(tmp_path, 40, 30, 100), [None] * 3, weights, position=position)
    for one, size in zip(seen, (40, 30, 100), strict=True):
        assert one == [n % size for n in range(len(one))]
    assert mix.round == min(len(one) // size for one, size in zip(seen, (40, 30, 100), strict=True)) == 1


def test_concat_goes_through_one_after_another_and_ends(tmp_path: Path) -> None:
    mix = Mix(sources_of(tmp_path, 3, 0, 2), [None] * 3, None)
    places = []
    for _ in range(2):
        while (found := mix.next()) is not None:
            places.append((mix.round, found[0], found[2]["n"]))  # type: ignore[index]
            mix = Mix(sources_of(tmp_path, 3, 0, 2), [None] * 3, None, position=mix.position())
    one = [(0, 0), (0, 1), (0, 2), (2, 0), (2, 1)]
    assert places == [(0, *each) for each in one] + [(1, *each) for each in one]


def test_a_weighted_source_without_rows_is_an_error(tmp_path: Path) -> None:
    mix = Mix(sources_of(tmp_path, 3, 0), [None] * 2, [1.0, 1.0])
    assert mix.next() is not None
    with pytest.raises(DataError, match="1.jsonl: there are no rows in it"):
        mix.next()


# --- blocks and steps ---------------------------------------------------------------------------------------


@pytest.fixture
def make_loader(toy_tokenizer: Any, tmp_path: Path) -> Callable[..., StreamLoader]:
    """Keys -> a loader of four rows a step, over 150 rows."""
    paths = []
    for name, start, stop in (("a", 0, 100), ("b", 100, 150)):
        paths.append(tmp_path / f"{name}.jsonl")
        lines = [json.dumps({"text": f"{n} " * (1 + n * 7 % 11)}) for n in range(start, stop)]
        paths[-1].write_text("\n".join(lines) + "\n")

    def make(processes: int = 1, **values: Any) -> StreamLoader:
        weights = values.pop("weights", [None, None])
        entries = [
            {"path": str(path), "type": "completion", **({"weight": weight} if weight else {})}
            for path, weight in zip(paths, weights, strict=True)
        ]
        flat = {"base_model": "none", "datasets": entries, "streaming": True, "max_steps": 90, "sequence_len": 64}
        config = Config.from_flat({"micro_batch_size": 4 // processes, **flat, **values})
        streamed = prepare(config, toy_tokenizer, processes).stream
        assert streamed is not None
        settings = dict(tokens_per_pass=100, seed=3, shuffle=config.data.shuffle, processes=processes)
        return StreamLoader(*streamed, total_steps=90, **settings)

    return make


def passes_of(loader: StreamLoader, index: int) -> list[Any]:
    """All that a step computes with."""
    step = loader.step(index)
    batches = list(loader.batches(step, torch.device("cpu")))
    return [step.epoch, loader.locations(step), [(b.input_ids.tolist(), b.seeds, b.lengths) for b in batches]]


CASES: list[dict[str, Any]] = [
    {"shuffle_buffer_size": 23},
    {"shuffle_buffer_size": 1},  # smaller than a step
    {"shuffle_buffer_size": 23, "sample_packing": True},
    {"shuffle_buffer_size": 150},
    {"shuffle_buffer_size": 23, "mix_strategy": "interleave", "weights": [1, 3]},
    {"shuffle_buffer_size": 9, "sample_packing": True, "mix_strategy": "interleave"},
    {"shuffle_buffer_size": 23, "val_set_size": 11, "shuffle": False},
]


@pytest.mark.parametrize("values", CASES, ids=str)
def test_a_loader_goes_on_from_any_step(make_loader: Callable[..., StreamLoader], values: dict[str, Any]) -> None:
    whole = make_loader(**values)
    steps, standing = [], []
    with whole.running():
        for index in range(90):
            steps.append(passes_of(whole, index))
            standing.append(json.dumps(whole.standing(index + 1)))
    for index in range(0, 89, 13):
        again = make_loader(**values)
        again.go_on(json.loads(standing[index]))
        assert [passes_of(again, n) for n in range(index + 1, min(90, index + 12))] == steps[index + 1 : index + 12]
    if values.get("mix_strategy") != "interleave":  # each row once a round, and no others
        for number in range(max(step[0] for step in steps)):
            places = [place for step in steps if step[0] == number for place in step[1]]
            expected = 150 - values.get("val_set_size", 0)
            assert len(places) == len(set(places)) == expected


def test_the_order_differs_by_round_and_by_seed(make_loader: Callable[..., StreamLoader]) -> None:
    orders = []
    for seed in (1, 2):
        loader = make_loader(shuffle_buffer_size=23, seed=seed)
        places = [place for index in range(76) for place in loader.locations(loader.step(index))]
        orders += [places[:150], places[150:300]]
    assert len({tuple(order) for order in orders}) == 4 and len({frozenset(order) for order in orders}) == 1
    numbers = [int(place.rsplit(":", 1)[1]) + (0 if "a.jsonl" in place else 100) for place in orders[0]]
    # a row stays within about a buffer of its place
    assert 5 < max(abs(at - number) for at, number in enumerate(numbers)) <= 2 * 23


def test_processes_have_the_same_steps(make_loader: Callable[..., StreamLoader]) -> None:
    one, two = make_loader(1, shuffle_buffer_size=23), make_loader(2, shuffle_buffer_size=23)
    for index in range(60):
        assert one.step(index).rows == two.step(index).rows
        assert one.standing(index)["start"] == two.standing(index)["start"]


def test_at_most_two_blocks_are_held(make_loader: Callable[..., StreamLoader], monkeypatch: pytest.MonkeyPatch) -> None:
    import gc
    import weakref

    alive: list[Any] = []
    make = blocks.Blocks.make

    def noted(self: Any, *arguments: Any) -> Any:
        made = make(self, *arguments)
        alive.append(weakref.ref(made))
        gc.collect()
        assert sum(each() is not None for each in alive) <= 2
        return made

    loader = make_loader(shuffle_buffer_size=16)
    alive.append(weakref.ref(loader.block))
    monkeypatch.setattr(blocks.Blocks, "make", noted)
    with loader.running():
        for index in range(30):
            loader.step(index)
    assert len(alive) >= 7


def test_changed_files_are_said_and_changed_rows_refused(
    make_loader: Callable[..., StreamLoader], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    loader = make_loader(shuffle_buffer_size=23)
    loader.step(15)
    standing = json.loads(json.dumps(loader.standing(16)))
    file = tmp_path / "a.jsonl"
    lines = file.read_text().splitlines()
    file.write_text("\n".join([*lines, lines[0]]) + "\n")  # grown at its end
    again = make_loader(shuffle_buffer_size=23)
    with caplog.at_level(logging.WARNING, "luthier"):
        again.go_on(standing)
    assert "changed since the run stopped" in caplog.text and "a.jsonl" in caplog.text
    lines[60] = json.dumps({"text": "something else"})
    file.write_text("\n".join(lines) + "\n")
    with pytest.raises(RunError, match="are not those that this run was trained on"):
        make_loader(shuffle_buffer_size=23).go_on(standing)


def test_a_bad_row_far_on_ends_the_run_with_its_place(
    make_loader: Callable[..., StreamLoader], tmp_path: Path
) -> None:
    with (tmp_path / "b.jsonl").open("a") as file:
        file.write("{broken\n")
    loader = make_loader(shuffle_buffer_size=23)
    with loader.running():
        loader.step(20)
        with pytest.raises(RunError, match=r"b.jsonl:51: not valid JSON.*skip_bad_rows"):
            loader.step(45)
    loader = make_loader(shuffle_buffer_size=23, skip_bad_rows=True)
    loader.step(45)
    assert loader.figures()["rows_left_out"] == 1


def test_templates_are_rendered_in_processes_that_stay(toy_tokenizer: Any, tmp_path: Path) -> None:
    """With the same result; and they end with the run."""
    talk = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Yes"}]
    file = tmp_path / "talks.jsonl"
    talks = [{"messages": [talk[0], {**talk[1], "content": str(n)}]} for n in range(1300)]
    file.write_text("".join(json.dumps(row) + "\n" for row in talks))
    found = []
    for processes in (1, 2):
        flat = {"base_model": "none", "streaming": True, "max_steps": 9, "dataset_processes": processes}
        data = {"datasets": [{"path": str(file), "type": "chat_template"}], "shuffle_buffer_size": 600}
        streamed = prepare(Config.from_flat({**flat, **data}), toy_tokenizer).stream
        assert streamed is not None
        loader = StreamLoader(*streamed, total_steps=1100, tokens_per_pass=100, seed=3, shuffle=True)
        pool = streamed.blocks._maker._pool
        with loader.running():
            found.append([passes_of(loader, index) for index in range(0, 1100, 111)])
            assert streamed.blocks._maker._pool is pool
        assert streamed.blocks._maker._pool is None
    assert found[0] == found[1]


def test_what_is_held_out_is_the_beginning_of_each_and_measured_again(toy_tokenizer: Any, tmp_path: Path) -> None:
    """By weight; and nothing of it is trained."""
    from luthier.data.held_out import held_out

    paths = []
    for name in ("a", "b"):
        paths.append(tmp_path / f"{name}.jsonl")
        paths[-1].write_text("".join(json.dumps({"text": f"{name} {n}", "group": name}) + "\n" for n in range(60)))
    entries = [
        {"path": str(path), "type": "completion", "weight": weight} for path, weight in zip(paths, (1, 3), strict=True)
    ]
    flat = {"base_model": "none", "datasets": entries, "streaming": True, "max_steps": 90, "micro_batch_size": 4}
    config = Config.from_flat({**flat, "mix_strategy": "interleave", "val_set_size": 12, "shuffle_buffer_size": 10})
    prepared = prepare(config, toy_tokenizer)
    validation = prepared.validation
    assert validation is not None and prepared.stream is not None
    expected = [f"{paths[0]}:{n}" for n in range(1, 4)] + [f"{paths[1]}:{n}" for n in range(1, 10)]
    assert [validation.location(n) for n in range(len(validation))] == expected
    loader = StreamLoader(*prepared.stream, total_steps=90, tokens_per_pass=100, seed=3, shuffle=True)
    trained = {place for index in range(90) for place in loader.locations(loader.step(index))}
    assert len(trained) == 57 + 51 and not trained & set(expected)
    again = held_out(config, toy_tokenizer)
    assert [again.documents.location(n) for n in range(12)] == expected
    rows = again.documents.rows
    assert again.datasets_of(rows) == ["a.jsonl"] * 3 + ["b.jsonl"] * 9
    assert [found["group"] for found in again.columns(["group"], rows.tolist()).values()] == ["a"] * 3 + ["b"] * 9
    with pytest.raises(DataError, match="holds nothing of them out"):
        held_out(Config.from_flat({**flat, "mix_strategy": "interleave"}), toy_tokenizer)


def test_preview_validate_and_plan_look_at_the_beginning(
    toy_tokenizer: Any,
    toy_llama_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from luthier.cli import main
    from luthier.plan.work import work_from_data

    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"text": f"row {n}"}) + "\n" for n in range(5000)))
    config = tmp_path / "run.yml"
    config.write_text(
        f"base_model: {toy_llama_dir}\ndatasets: [{{path: {file}, type: completion}}]\nstreaming: true\n"
        "shuffle_buffer_size: 50\nmax_steps: 1000\nmicro_batch_size: 4\nsequence_len: 64\nval_set_size: 10\n"
    )
    parsed: list[bytes] = []
    object_of = files.object_of
    monkeypatch.setattr(files, "object_of", lambda line: (parsed.append(line), object_of(line))[1])
    for verb in ("preview", "validate"):
        assert main([verb, str(config)]) == 0
        shown = capsys.readouterr().out
        assert "the first 50 rows are looked at before training (how many there are is not known)" in shown
    work = work_from_data(Config.load(config), toy_tokenizer)
    assert work.steps == 1000 and work.tokens is not None and work.tokens > 4000 and "stream" in work.source
    assert len(parsed) == 3 * 60
