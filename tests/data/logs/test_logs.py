"""From logs to rows: what each stage finds, what it counts, and that a run that was killed goes on to the same bytes."""

# ruff: noqa: E501 (rows of tables)

from __future__ import annotations

import bz2
import gzip
import itertools
import json
import lzma
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from luthier import cli
from luthier.data.logs import mask as masks
from luthier.data.logs import settings as bounds
from luthier.data.logs.counts import Counts
from luthier.data.logs.decode import Decoder, binary_kind, encoding_of
from luthier.data.logs.records import Joiner, starts_of
from luthier.data.logs.repeats import Seen, is_kept
from luthier.data.logs.severity import severity_of, without_severity

pytest.importorskip("drain3", reason="template mining needs luthier[logs]")
zstandard = pytest.importorskip("zstandard", reason="zstd needs luthier[logs]")


def line(n: int) -> str:
    return f"2024-05-01 10:{n // 60 % 60:02d}:{n % 60:02d} INFO worker[{n}]: job {n * 7} of user=ann{n % 3} from 10.0.{n % 7}.{n % 250}"


LOG = "".join(f"{line(n)}\n" for n in range(400))


def prepare(*arguments: object) -> int:
    return cli.main(["prepare", "logs", *map(str, arguments)])


def rows_of(path: Path) -> list[dict]:
    return [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()]


def decoded(data: bytes, size: int = 1 << 20, longest: int = 65536) -> tuple[list[tuple[str, int]], Counts]:
    counts = Counts()
    encoding, mark = encoding_of(data[:65536], None)
    decoder = Decoder(encoding, longest, counts)
    data = data[mark:]
    lines = [each for at in range(0, len(data), size) for each in decoder.lines(data[at : at + size])]
    return lines + decoder.last(), counts


# --- bytes to lines


@pytest.mark.parametrize("size", [3, 7, 64, 1 << 20])
@pytest.mark.parametrize(
    ("data", "texts"),
    [
        (b"a\nb\n", ["a", "b"]),
        (b"a\r\nb\r\n\r\nc", ["a", "b", "", "c"]),
        (b"10%\r20%\rdone\nnext\r\n", ["10%", "20%", "done", "next"]),
        ("\ufeffé\n日本\n".encode(), ["é", "日本"]),
        ("é😀\r\nb\r\nlonger text here".encode("utf-16"), ["é😀", "b", "longer text here"]),
        ("a\rb\nc\r\n\rd😀\r".encode("utf-16"), ["a", "b", "c", "", "d😀"]),
        (("plain words\n" * 4).encode("utf-16-be"), ["plain words"] * 4),
        ("caf\u00e9 \u2013 ok\n".encode("cp1252"), ["café – ok"]),
        (b"caf\xe9 \x81\n", ["café "]),  # 0x81 means nothing in Windows-1252, and is a control character in Latin-1
        (b"\x1b[31mred\x1b[0m\n", ["red"]),
        (b"", []),
        (b"\n", [""]),
    ],
)
def test_lines_and_their_bytes(data: bytes, texts: list[str], size: int) -> None:
    lines, _ = decoded(data, size)
    assert [text for text, _ in lines] == texts
    mark = encoding_of(data, None)[1]
    assert sum(n for _, n in lines) == len(data) - mark


def test_what_is_odd_is_counted() -> None:
    blob = bytes(random.Random(0).randbytes(3000))
    lines, counts = decoded(b"one\n" + blob + b"\ntwo caf\xe9\n\x00\x00three\x00\n")
    texts = [text for text, _ in lines if text]
    assert texts[0] == "one" and texts[-2:] == ["two café", "three"]
    assert len(texts) <= 5  # of the blob, a few short pieces may look like text
    assert counts["binary_blobs"] >= 1 and counts["binary_bytes"] > 2800
    assert counts["lines_fallback"] == 1 and counts["control_characters"] == 3


@pytest.mark.parametrize("size", [100, 1000, 1 << 20])
def test_long_lines_are_cut_and_counted(size: int) -> None:
    lines, counts = decoded(b"x" * 5000 + b"\nshort\n", size, longest=300)
    assert [text for text, _ in lines] == ["x" * 300, "short"]
    assert lines[0][1] == 5001
    assert counts["lines_cut"] == 1 and counts["bytes_cut"] in (4700, 4701)


@pytest.mark.parametrize(
    "head", [b"\x7fELF\x02\x01\x01" + bytes(500), b"\x89PNG\r\n\x1a\n" + bytes(range(256)), random.Random(1).randbytes(4000)]
)
def test_files_that_are_no_text(head: bytes) -> None:
    assert binary_kind(head) is not None
    assert binary_kind(LOG.encode()) is None


# --- lines to records


def records_of(text: str) -> list[str]:
    lines = text.splitlines()
    joiner = Joiner(starts_of(lines), Counts())
    return [each.text for each in joiner.records([(one, len(one) + 1) for one in lines]) + joiner.last()]


JAVA = "java.lang.IllegalStateException: bad\n\tat a.B.c(B.java:1)\nCaused by: x.Y: z\n\t... 3 more"
PYTHON = 'Traceback (most recent call last):\n  File "a.py", line 1, in <module>\nValueError: no'


@pytest.mark.parametrize(
    "records",
    [
        [f"2024-05-01 10:00:00,123 ERROR x failed\n{JAVA}", "2024-05-01 10:00:01,000 INFO fine"],
        ["Dec 10 06:55:46 host sshd[1]: a", "Dec 10 06:55:47 host sshd[1]: b\nnot led"],
        ["[Sun Dec 04 04:47:44 2005] [notice] a", "[Sun Dec 04 04:47:45 2005] [error] b"],
        ["081109 203615 148 INFO dfs: a", "081109 203807 222 INFO dfs: b"],
        ['1.2.3.4 - - [10/Oct/2000:13:55:36 -0700] "GET / HTTP/1.0" 200 1', '1.2.3.4 - - [10/Oct/2000:13:55:37 -0700] "GET /x" 200 1'],
        ['{"t": 1, "m": "a"}', '{"t": 2, "m": "b"}'],
        [f"first\n{PYTHON}", "second"],
        [f"failed: {JAVA}", "next", "other\n  indented\n  more"],
        ["begin", "-----BEGIN RSA PRIVATE KEY-----\nabc\ndef\n-----END RSA PRIVATE KEY-----", "end"],
    ],
)
def test_continuation_lines_are_joined(records: list[str]) -> None:
    assert records_of("\n".join(records)) == records


def test_a_record_has_a_bound() -> None:
    long = "\n".join(f"  at {n}" for n in range(1200))
    assert [len(each.splitlines()) for each in records_of(f"2024-05-01 10:00:00 x\n{long}")] == [500, 500, 201]


# --- masks


def all_masks(masker: masks.Masker, text: str) -> tuple[masks.Mask, ...]:
    """As a run picks them: for a text among others."""
    shapes, by_length = masker.shapes(["before 1", text, "behind ::"])
    return masker.that_may_match(shapes[1], by_length.get(1, ()))


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("from 10.2.3.4 port 22", "from <IP> port 22"),
        ("peer fe80::1ff:fe23:4567:890a up, ::1", "peer <IPV6> up, <IPV6>"),
        ("at 12:34:56 ok", "at 12:34:56 ok"),
        ("eth0 00:1B:44:11:3a:b7", "eth0 <MAC>"),
        ("to ann.b+c@mail.example.org.", "to <EMAIL>."),
        ("Invalid user bob from x", "Invalid user <USER> from x"),
        ("Failed password for invalid user eve from", "Failed password for invalid user <USER> from"),
        ("Accepted password for root from", "Accepted password for <USER> from"),
        ("logname= uid=0 euid=0 ruser= user=uucp", "logname= uid=0 euid=0 ruser= user=<USER>"),
        ("open /home/carol/x.txt", "open /home/<HOME>/x.txt"),
        ("AKIAIOSFODNN7EXAMPLE used", "<TOKEN> used"),
        ("ghp_" + "a1" * 18, "<TOKEN>"),
        ("Authorization: Bearer abcdef0123456789xyz", "Authorization: Bearer <BEARER>"),
        ("eyJhbGciOiJI.eyJzdWIiOiIx.SflKxwRJSM", "<JWT>"),
        ("password=hunter2, db", "password=<PASSWORD>, db"),
        ('{"api_key": "a b c"}', '{"api_key": "<PASSWORD>"}'),
        ("https://me:pw1@host/x", "https://<LOGIN>@host/x"),
        ("card 4111 1111 1111 1111 paid", "card <CARD> paid"),
        ("card 4111 1111 1111 1112 paid", "card 4111 1111 1111 1112 paid"),
        ("hash 9f86d081884c7d659a2feaa0c55ad015", "hash <SECRET>"),
        ("081109 203615 148 INFO blk_-6952295868487656571", "081109 203615 148 INFO blk_-6952295868487656571"),
        ("/mnt/hadoop/dfs/data/current/subdir11/blk_1", "/mnt/hadoop/dfs/data/current/subdir11/blk_1"),
        ("-----BEGIN PRIVATE KEY-----\nMIIE\n-----END PRIVATE KEY-----", "<PRIVATE_KEY>"),
    ],
)
def test_masks(text: str, wanted: str) -> None:
    counts = Counts()
    masker = masks.Masker(masks.chosen([], []), (), None, counts)
    assert masker.masked(text, all_masks(masker, text)) == wanted
    assert bool(counts.of("masked")) == (text != wanted)


def test_pseudonyms_are_the_same_for_the_same(tmp_path: Path) -> None:
    (tmp_path / "key").write_bytes(b"k")
    masker = masks.Masker(("ip",), (("order", r"ORD\d+"),), str(tmp_path / "key"), Counts())
    said = [masker.masked(text, all_masks(masker, text)) for text in ("10.0.0.1 10.0.0.2 10.0.0.1", "ORD7 10.0.0.1")]
    first, second, again = said[0].split()
    assert first == again == said[1].split()[1] != second
    assert said[1].startswith("<ORDER_")


# --- repeats


def test_thinning_keeps_ever_fewer() -> None:
    kept = [k for k in range(1, 1601) if is_kept(k, 100)]
    assert kept[:101] == [*range(1, 101), 102]
    assert [sum(low < k <= 2 * low for k in kept) for low in (100, 200, 400, 800)] == [50, 50, 50, 50]
    assert all(is_kept(k, 0) for k in kept)


def test_nothing_is_forgotten_until_the_table_is_nearly_full() -> None:
    seen, start = Seen(1 << 15), "record "
    full = 24_576  # three quarters of the places, through one doubling
    assert all(seen.first(f"{start}{n}") for n in range(full))
    assert not any(seen.first(f"{start}{n}") for n in range(full)) and seen.forgotten == 0
    assert all(seen.first(f"other {n}") for n in range(60_000))
    # The last ones are known, however many there were.
    assert not any(seen.first(f"other {n}") for n in range(50_000, 60_000)) and seen.forgotten > 50_000
    assert seen.dump().nbytes == 8 << 15


# --- severity


@pytest.mark.parametrize(
    ("text", "level"),
    [
        ("[Sun Dec 04 04:47:44 2005] [error] mod_jk child in error state 6", "ERROR"),
        ("081109 203615 148 WARN dfs: Got exception", "WARNING"),
        ('{"level":"info","m":"no warnings"}', "INFO"),
        ("E0102 03:04:05.678 1 x.go:1] fatal thing", "ERROR"),
        ("Dec 10 06:55:46 LabSZ sshd[1]: error: Received disconnect", "ERROR"),
        ("nothing said", None),
    ],
)
def test_severity_leaves_nothing_of_the_label(text: str, level: str | None) -> None:
    assert severity_of(text) == level
    asked = without_severity(text).lower()
    assert not any(word in asked.replace(">", " ").split() for word in ("error", "[error]", "warn", "info", "fatal", "warnings"))
    assert level is None or "<level>" in asked


# --- the command


@pytest.fixture
def logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "logs"
    (folder / "old").mkdir(parents=True)
    (folder / "app.log").write_text(LOG)
    return folder


@pytest.mark.parametrize("kind", ["plain", "gzip", "several", "zstd", "bz2", "xz"])
def test_compressed_files_give_what_plain_ones_do(logs: Path, kind: str) -> None:
    data = LOG.encode()
    packed = {
        "plain": data, "gzip": gzip.compress(data), "several": gzip.compress(data[:5000]) + gzip.compress(data[5000:]),
        "zstd": zstandard.compress(data), "bz2": bz2.compress(data), "xz": lzma.compress(data),
    }[kind]  # fmt: skip
    assert prepare(logs / "app.log", "--out", "plain.jsonl") == 0
    (logs / "app.log").write_bytes(packed)  # the name says nothing
    assert prepare(logs / "app.log", "--out", "packed.jsonl") == 0
    assert Path("packed.jsonl").read_bytes() == Path("plain.jsonl").read_bytes()


def test_a_file_that_breaks_off_is_used_as_far_as_it_goes(logs: Path, capfd: pytest.CaptureFixture[str]) -> None:
    packed = gzip.compress(LOG.encode())
    (logs / "app.log").write_bytes(packed[: len(packed) // 2])
    assert prepare(logs, "--out", "d.jsonl") == 0
    assert "damaged gzip" in capfd.readouterr().err
    counts = json.loads(Path("d.jsonl.summary.json").read_text())["counts"]
    assert counts["truncated"] == 1 and 50 < counts["records"] < 300


def test_rows_say_where_they_are_from_and_nothing_is_lost(logs: Path) -> None:
    (logs / "old" / "app.log.1.gz").write_bytes(gzip.compress((LOG * 2).replace("worker", "daemon").encode()))
    (logs / "old" / "core").write_bytes(b"\x7fELF" + bytes(3000))
    (logs / "empty.log").touch()
    assert prepare(logs, "--out", "d.jsonl", "--max-tokens", 500, "--keep-per-template", 0, "--overlap", 1) == 0
    rows = rows_of(Path("d.jsonl"))
    for row, after in itertools.pairwise(rows):
        where = row["provenance"]
        data = LOG.encode() if where["source"] == "logs/app.log" else (LOG * 2).replace("worker", "daemon").encode()
        begin, end = where["bytes"]
        assert data[begin:end].count(b"\n") == where["lines"][1] - where["lines"][0] + 1 >= where["records"]
        assert data[begin:].startswith(row["text"].split(" INFO")[0].encode())
        if after["provenance"]["source"] == where["source"]:
            assert after["text"].startswith(row["text"].rsplit("\n", 1)[1])  # the overlap
        assert len(row["text"]) / 2 <= 500
    counts = json.loads(Path("d.jsonl.summary.json").read_text())["counts"]
    assert counts["files"] == 2 and counts["files_skipped"] == {"empty": 1, "programs": 1}
    assert counts["records"] == 1200 == counts["kept"] + counts["duplicates"] and counts["duplicates"] == 400
    assert counts["masked"] == {"ip": 1200, "user": 1200}
    assert sum(each["records"] for each in rows_of(Path("d.jsonl.templates.jsonl"))) == 1200


def test_an_overlap_in_tokens(logs: Path) -> None:
    assert prepare(logs, "--out", "d.jsonl", "--max-tokens", 500, "--keep-per-template", 0, "--overlap-tokens", 150) == 0
    rows = [row["text"].split("\n") for row in rows_of(Path("d.jsonl"))]
    for before, after in itertools.pairwise(rows):
        again = [text for text in after if text in before]
        assert again == before[-len(again) :] and 100 < len("\n".join(again)) / 2 <= 150


def test_validation_is_the_last_part_and_shares_nothing(logs: Path) -> None:
    assert prepare(logs, "--out", "d.jsonl", "--validation", "v.jsonl", "--validation-share", 0.25, "--keep-per-template", 0,
                   "--max-tokens", 600) == 0  # fmt: skip
    train, held = rows_of(Path("d.jsonl")), rows_of(Path("v.jsonl"))
    assert max(row["provenance"]["bytes"][1] for row in train) <= min(row["provenance"]["bytes"][0] for row in held)
    lines = [{text for row in rows for text in row["text"].split("\n")} for rows in (train, held)]
    assert not lines[0] & lines[1] and abs(len(lines[1]) - 100) <= 2


def test_instruction_rows(logs: Path) -> None:
    (logs / "app.log").write_text(LOG + "".join(f"2024-05-01 11:00:{n:02d} ERROR disk {n} of worker is full\n" for n in range(30)))
    kinds = "severity,template,next-line,summarise"
    assert prepare(logs, "--out", "d.jsonl", "--as", kinds, "--max-tokens", 700) == 0
    rows = rows_of(Path("d.jsonl"))
    asked = Counter(row["instruction"].split()[1] for row in rows)
    assert len(asked) == 4
    texts = {row["text"] for row in rows_of(Path("d.jsonl.templates.jsonl"))}
    for row in rows:
        assert isinstance(row["output"], str) and row["output"] and row["provenance"]["records"] >= 1
        if row["instruction"].startswith("What is the severity"):
            assert row["output"] in ("INFO", "ERROR") and row["output"] not in row["input"]
        elif row["instruction"].startswith("Write the template"):
            assert row["output"] in texts
        elif row["instruction"].startswith("Summarise"):
            assert sum(int(part.split(" x ")[0]) for part in row["output"].split("\n")) == len(row["input"].split("\n"))
        else:
            # The record that came next in the log, not the next one that was kept.
            assert row["provenance"]["lines"][1] - row["provenance"]["lines"][0] == len(row["input"].split("\n"))


def test_sessions_and_their_labels(logs: Path) -> None:
    lines = [f"081109 2036{n % 60:02d} {n} INFO dfs: Receiving block blk_{-5 + n % 10} step {n}" for n in range(100)]
    (logs / "app.log").write_text("\n".join(lines))
    Path("labels.csv").write_text("BlockId,Label\n" + "".join(f"blk_{k},{'Anomaly' if k == 3 else 'Normal'}\n" for k in range(-5, 4)))
    assert prepare(logs, "--out", "d.jsonl", "--as", "anomaly", "--labels", "labels.csv") == 0
    rows = {row["provenance"]["session"]: row for row in rows_of(Path("d.jsonl"))}
    assert set(rows) == {f"blk_{k}" for k in range(-5, 4)}  # blk_4 has no label
    assert rows["blk_3"]["output"] == "anomalous" and rows["blk_-5"]["output"] == "normal"
    assert all(len(row["input"].split("\n")) == row["provenance"]["records"] == 10 for row in rows.values())
    # Other columns, and another key.
    Path("labels.csv").write_text("Label,note,step\n0,a,11\n1,b,12\n")
    named = ["--label-columns", "step,Label", "--label-key", r"step (\d+)"]
    assert prepare(logs, "--out", "e.jsonl", "--as", "anomaly", "--labels", "labels.csv", *named) == 0
    assert [row["output"] for row in rows_of(Path("e.jsonl"))] == ["normal", "anomalous"]


def test_memory_filesystem_as_source_and_output(logs: Path) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.pipe({"/in/a.log": LOG.encode(), "/in/b/c.log.zst": zstandard.compress(LOG.replace("job", "task").encode())})
    try:
        assert prepare("memory://in", "--out", "memory://out/d.jsonl") == 0
        assert memory.cat("/out/d.jsonl").count(b"\n") > 1
        assert b'"source": "memory:///in/b/c.log.zst"' in memory.cat("/out/d.jsonl")
        assert prepare("memory://in/*.log", f"file://{logs}/*.log", "--out", "d.jsonl") == 0
        assert json.loads(Path("d.jsonl.summary.json").read_text())["counts"]["files"] == 2
        assert prepare("memory://in", "--out", "memory://out/d.jsonl") == 1
    finally:
        memory.rm("/", recursive=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing/*.log", "--out", "d.jsonl"], "no file matches"),
        (["nothing.log", "--out", "d.jsonl"], "there is no file there"),
        (["logs"], "--out is missing"),
        (["logs", "--out", "d.jsonl", "--as", "summarize"], "Did you mean summarise?"),
        (["logs", "--out", "d.jsonl", "--as", "completion,template"], "goes alone"),
        (["logs", "--out", "d.jsonl", "--record-start", "("], "no regular expression"),
        (["logs", "--out", "d.jsonl", "--mask-pattern", "x=["], "no regular expression"),
        (["logs", "--out", "d.jsonl", "--no-mask", "mails"], "Did you mean email?"),
        (["logs", "--out", "d.jsonl", "--as", "anomaly"], "needs labels"),
        (["logs", "--out", "d.jsonl", "--as", "anomaly", "--labels", "x.csv"], "x.csv: there is no such file"),
        (["logs", "--out", "logs"], "is a folder"),
        (["logs", "--out", "d.jsonl", "--tokenizer", "./nope"], "there is no such folder"),
        (["logs", "--out", "d.jsonl", "--encoding", "utf-99"], "Python knows no such encoding"),
        (["logs/old", "--out", "d.jsonl"], "no row came out"),
        (["logs", "--out", "d.jsonl", "--label-columns", "a,b"], "there is no --labels"),
        (["nosuch://x", "--out", "d.jsonl"], "nosuch"),
    ],
)
def test_bad_input(logs: Path, capfd: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    (logs / "old" / "core").write_bytes(b"\x7fELF" + bytes(3000))
    assert prepare(*arguments) in (1, 2)
    err = capfd.readouterr().err
    assert message in err and "internal error" not in err
    assert not Path("d.jsonl").exists()


def test_a_missing_driver_is_named_with_its_extra(logs: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("s3fs", "adlfs", "gcsfs"):
        monkeypatch.setitem(sys.modules, module, None)
    for url, extra in (("s3://b/x", "s3"), ("az://b/x", "azure"), ("gs://b/x", "gcs")):
        assert prepare(url, "--out", "d.jsonl") == 2
        assert f"luthier[{extra}]" in capfd.readouterr().err


def test_what_is_finished_is_not_overwritten(logs: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert prepare(logs, "--out", "d.jsonl") == 0
    assert prepare(logs, "--out", "d.jsonl") == 1
    assert "--overwrite" in capfd.readouterr().err
    assert prepare(logs, "--out", "d.jsonl", "--overwrite") == 0


def test_a_dry_run_writes_nothing(logs: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert prepare(logs, "--dry-run", "--limit", 100) == 0
    assert "100 records" in capfd.readouterr().out
    assert sorted(Path().iterdir()) == [Path("logs")]


# --- resuming

KINDS = [pytest.param("completion", marks=pytest.mark.slow), "severity,template,next-line,summarise"]
KILLED = """
import os, signal, sys
from luthier.data.logs import settings, progress
settings.BLOCK, settings.CHECKPOINT = 4096, 16384
number = int(os.environ["KILL_AT"])
if number:
    save = progress.Progress.save
    def killing(self, *arguments):
        save(self, *arguments)
        if self._number == number:
            self.write("train", b"half a row"); self._files["train"].flush()
            os.kill(os.getpid(), signal.SIGKILL)
    progress.Progress.save = killing
from luthier.cli import main
sys.exit(main(sys.argv[1:]))
"""


def varied(seed: int) -> str:
    draw = random.Random(seed)
    words = [f"w{chr(97 + n % 26)}{chr(97 + n // 26)}" for n in range(60)]
    out = []
    for n in range(700):
        text = line(draw.randrange(500)).replace("worker", draw.choice(words))
        out.append(text + (f"\n\tat {draw.choice(words)} é" * draw.randrange(3) if n % 7 == 0 else ""))
    return "\n".join(out)


@pytest.mark.parametrize("kinds", KINDS)
def test_a_killed_run_goes_on_to_the_same_bytes(logs: Path, kinds: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for n in range(3):
        (logs / f"{n}.log").write_text(varied(n))
    (logs / "3.log.gz").write_bytes(gzip.compress(varied(3).encode()))
    monkeypatch.setattr(bounds, "BLOCK", 4096)
    monkeypatch.setattr(bounds, "CHECKPOINT", 16384)
    more = ["--as", kinds, "--validation", "v.jsonl", "--max-tokens", "700", "--keep-per-template", "20"]
    command = [str(logs), "--out", "d.jsonl", *more]
    assert prepare(*command) == 0
    names = ["d.jsonl", "v.jsonl", "d.jsonl.templates.jsonl", "d.jsonl.summary.json"]
    wanted = {name: Path(name).read_bytes() for name in names}
    for name in names:
        Path(name).unlink()
    for kill_at in (1, 6):  # one after the other: it goes on from where it was killed
        env = os.environ | {"KILL_AT": str(kill_at)}
        done = subprocess.run([sys.executable, "-c", KILLED, "prepare", "logs", *command], env=env, check=False, capture_output=True)
        assert done.returncode == -signal.SIGKILL, done.stderr
    assert not Path("d.jsonl").exists()
    assert prepare(*command) == 0
    for name in names:
        assert Path(name).read_bytes() == wanted[name], name
    assert not Path("d.jsonl.progress").exists()


def test_other_options_or_sources_are_an_error(logs: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    (logs / "1.log").write_text(varied(1))
    env = os.environ | {"KILL_AT": "1"}
    command = [sys.executable, "-c", KILLED, "prepare", "logs", "logs", "--out", "d.jsonl"]
    assert subprocess.run(command, env=env, check=False, capture_output=True).returncode == -signal.SIGKILL
    assert prepare("logs", "--out", "d.jsonl", "--max-tokens", 900) == 1
    assert "with other options" in capfd.readouterr().err
    (logs / "1.log").write_text(varied(2))
    time.sleep(0.01)
    assert prepare("logs", "--out", "d.jsonl") == 1
    assert "changed since" in capfd.readouterr().err
    assert prepare("logs", "--out", "d.jsonl", "--overwrite") == 0


# --- memory

MEASURED = """
import sys
from pathlib import Path
from luthier.data.logs import run, settings
settings.MEMO_BYTES, settings.TEMPLATE_BYTES, settings.SEEN_SLOTS, settings.CHECKPOINT = 1 << 19, 1 << 20, 1 << 15, 1 << 21
from luthier.cli import main
code = main(["prepare", "logs", sys.argv[1], "--out", sys.argv[2], "--as", "severity,template,next-line,summarise"])
status = Path("/proc/self/status").read_text()  # of getrusage, the peak is also that of whoever started the process
print("PEAK", status.split("VmHWM:")[1].split()[0])
sys.exit(code)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read in /proc")
def test_memory_does_not_grow_with_the_log(tmp_path: Path) -> None:
    """Lines of drawn words, so that all tables are full within the first MB or two; then four times as much is read."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghij", k=7)) for _ in range(20_000)]
    peaks = []
    for n in (15_000, 60_000):
        with zstandard.open(tmp_path / f"{n}.zst", "wt") as file:
            for k in range(n):
                file.write(f"2024-05-01 10:00:{k % 60:02d} INFO {' '.join(draw.choices(words, k=draw.randrange(6, 14)))} {k}\n")
        done = subprocess.run(
            [sys.executable, "-c", MEASURED, str(tmp_path / f"{n}.zst"), str(tmp_path / f"{n}.jsonl")], check=True, capture_output=True, text=True
        )
        peaks.append(int(done.stdout.rsplit("PEAK", 1)[1]) / 1024)
    assert peaks[1] < peaks[0] + 8 and peaks[1] < 100, peaks  # MiB; what malloc keeps may differ a little


# --- an object store


@pytest.mark.slow
def test_s3_is_read_and_written_where_it_is(logs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against moto's server on the loopback: sizes and bytes go over HTTP."""
    pytest.importorskip("s3fs", reason="s3:// needs luthier[s3]")
    server = pytest.importorskip("moto.server", reason="the loopback S3 server is moto's")
    import fsspec

    for name, value in (("AWS_ACCESS_KEY_ID", "k"), ("AWS_SECRET_ACCESS_KEY", "s"), ("AWS_DEFAULT_REGION", "us-east-1")):
        monkeypatch.setenv(name, value)
    running = server.ThreadedMotoServer(port=0, verbose=False)
    running.start()
    try:
        endpoint = "http://{}:{}".format(*running.get_host_and_port())
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        store = fsspec.filesystem("s3", skip_instance_cache=True)
        store.mkdir("bucket")
        store.pipe("bucket/app/a.log", LOG.encode())
        store.pipe("bucket/app/old/b.log.gz", gzip.compress(LOG.replace("job", "task").encode()))
        (logs / "app.log").unlink()
        for name, data in (("a.log", LOG), ("old/b.log", LOG.replace("job", "task"))):
            (logs / name).write_text(data)
        assert prepare("s3://bucket/app", "--out", "s3://bucket/out/d.jsonl", "--storage-option", "use_listings_cache=false") == 0
        assert prepare(logs, "--out", "d.jsonl") == 0
        there = [json.loads(text) for text in store.cat("bucket/out/d.jsonl").splitlines()]
        assert [row["text"] for row in there] == [row["text"] for row in rows_of(Path("d.jsonl"))]
        assert {row["provenance"]["source"] for row in there} == {"s3://bucket/app/a.log", "s3://bucket/app/old/b.log.gz"}
        assert prepare("s3://nothing/here", "--out", "x.jsonl") == 1
    finally:
        running.stop()


# --- to a training run


def test_a_few_steps_on_logs_lower_the_loss(shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = Path(cli.__file__).parent / "demo" / "base_model"
    monkeypatch.chdir(tmp_path)
    made = ["--out", "logs.jsonl", "--validation", "later.jsonl", "--tokenizer", base, "--max-tokens", 96]
    assert prepare(shared_data / "logs" / "Apache_2k.log", *made) == 0
    Path("cfg.yml").write_text(
        f"base_model: {base}\nadapter: lora\nlora_r: 8\nlora_alpha: 16\nlora_target_linear: true\n"
        "datasets: [{path: 'logs.jsonl#60', type: completion}]\ntest_datasets: [{path: 'later.jsonl#8', type: completion}]\n"
        "sequence_len: 96\nmicro_batch_size: 4\nmax_steps: 8\nlearning_rate: 5e-3\neval_steps: 4\noutput_dir: run\n"
    )
    assert cli.main(["train", "cfg.yml"]) == 0
    losses = [row["eval_loss"] for row in rows_of(Path("run/metrics.jsonl")) if "eval_loss" in row]
    assert len(losses) >= 2 and losses[-1] < losses[0]


@pytest.mark.slow
def test_public_logs_end_in_a_run_whose_perplexity_falls(shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The three files, from the command line to the loss on rows that come later in each of them."""
    base = Path(cli.__file__).parent / "demo" / "base_model"
    monkeypatch.chdir(tmp_path)
    made = ["--out", "logs.jsonl", "--validation", "later.jsonl", "--tokenizer", base, "--max-tokens", 192]
    assert prepare(shared_data / "logs" / "*.log", *made) == 0
    counts = json.loads(Path("logs.jsonl.summary.json").read_text())["counts"]
    assert counts["records"] == 6000 and counts["duplicates"] == 539 and counts["masked"]["ip"] > 3000
    Path("cfg.yml").write_text(
        f"base_model: {base}\nadapter: lora\nlora_r: 8\nlora_alpha: 16\nlora_target_linear: true\n"
        "datasets: [{path: logs.jsonl, type: completion}]\ntest_datasets: [{path: 'later.jsonl#24', type: completion}]\n"
        "sequence_len: 192\nmicro_batch_size: 4\nmax_steps: 12\nlearning_rate: 3e-3\neval_steps: 4\n"
        "logging_steps: 4\noutput_dir: run\n"
    )
    assert cli.main(["train", "cfg.yml"]) == 0
    losses = [row["eval_loss"] for row in rows_of(Path("run/metrics.jsonl")) if "eval_loss" in row]
    assert len(losses) >= 2 and losses[-1] < losses[0] - 0.2
