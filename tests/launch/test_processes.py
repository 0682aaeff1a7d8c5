"""Processes that are started and how they end, under torch's agent; what they train is a stub."""

from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import TCPStore

from luthier.config import Config
from luthier.errors import LuthierError
from luthier.launch import processes as launching
from luthier.launch.ended import STOPPED_ELSEWHERE, Ended, Report, failure, is_consequence, last_said
from luthier.launch.processes import run_in_processes

ROOT = Path(__file__).parents[2]
STUB = "tests.launch.stub"
IMPORTS = (
    "import sys\nfrom pathlib import Path\n"
    "from tests.launch.test_processes import STUB, _config, run_in_processes\n"
)


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """start(what each rank does): two processes of a stub, up to their end."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(launching.tempfile, "tempdir", None)
    monkeypatch.delenv("WORLD_SIZE", raising=False)

    def run(what: str) -> None:
        run_in_processes(_config(tmp_path, what), 2, module=STUB)

    return run


def _config(folder: Path, what: str) -> Config:
    flat = {"base_model": what, "datasets": [{"path": "d", "type": "alpaca"}], "device_map": "cpu"}
    return Config.from_flat({**flat, "output_dir": str(folder)})


@contextmanager
def sent(folder: Path, *signals: signal.Signals) -> Iterator[None]:
    """This process gets signals, once both of its processes are in the middle of something."""

    def send() -> None:
        if _both_ready(folder):
            for number in signals:
                os.kill(os.getpid(), number)
                time.sleep(0.2)

    thread = threading.Thread(target=send, daemon=True)
    thread.start()
    yield
    thread.join(10)


def _both_ready(folder: Path) -> bool:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        if len(list(folder.glob("ready-*"))) == 2:
            return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("1: data error", "^rank 1: rows.jsonl:3: no output$"),
        ("0: data error, 1: data error", "^rows.jsonl:3: no output$"),
        ("0: lost, 1: odd", r"^rank 1: internal error: ValueError: odd \(--debug shows where; please report it\)$"),
        ("0: gloo, 1: memory", "^rank 1: out of memory at step 3 on rank 1: goes on in passes of up to 128 tokens$"),
        (
            "0: lost, 1: kill",
            r"^rank 1 \(process \d+\) was killed by SIGKILL, as the system does where memory runs out .*; it said "
            r"last: warning: rank 1: the last word\. .* There is no checkpoint yet: .*_checkpoint auto begins anew$",
        ),
        (
            "0: gloo, 1: crash",
            r"was killed by SIGSEGV, a crash in native code; it said last: Fatal Python error: Segmentation fault "
            r'File ".*stub.py", line \d+ in act; all that it wrote is in (.*/rank-1.log)\.',
        ),
        ("0: exit, 1: wait", r"^rank 0 \(process \d+\) ended with exit status 3 and without a message"),
    ],
)
def test_one_message_says_what_happened(
    start: Callable[..., None], tmp_path: Path, capfd: pytest.CaptureFixture[str], what: str, says: str
) -> None:
    with pytest.raises(LuthierError) as caught:
        start(what)
    assert re.search(says, str(caught.value)), str(caught.value)
    assert caught.value.exit_status == 1
    err = capfd.readouterr().err
    assert "Traceback" not in err and "another of" not in err
    if "odd" in what:  # what the command line shows of it with --debug
        assert 'raise error\nValueError: odd' in caught.value.__notes__[0]
    kept = list(tmp_path.glob("luthier-launch-*/rank-1.log"))
    assert [str(path) in str(caught.value) for path in kept] == ([True] if "crash" in what else [])
    assert (tmp_path / "saved-1").exists() == ("wait" in what), "whoever can end by itself is given the time"


def test_who_hangs_is_killed_after_a_while(
    start: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a process in a collective, which no signal reaches."""
    (tmp_path / "checkpoint-5").mkdir()
    (tmp_path / "checkpoint-40").mkdir()
    monkeypatch.setattr(launching, "_SETTLE_SECONDS", 0.5)
    with pytest.raises(LuthierError, match=r"^rank 1 .* SIGKILL.*auto goes on from checkpoint-40$"):
        start("0: hang, 1: kill")


def test_only_the_first_has_the_terminal(
    start: Callable[..., None], capfd: pytest.CaptureFixture[str]
) -> None:
    start("0: speak, 1: speak")
    out, err = capfd.readouterr()
    assert out == "a print of a library\n"
    lines = err.splitlines()
    assert lines.count("information") == lines.count("warning: something is odd") == 1
    assert lines.count("warning: rank 1: something is odd") == 1
    assert err.count("UserWarning: a warning of a library") == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_handed_on_once_and_waited_for(
    start: Callable[..., None], tmp_path: Path, number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launching, "_SETTLE_SECONDS", 0.0)
    before = signal.getsignal(number)
    with sent(tmp_path, number):
        start("0: wait, 1: wait")
    assert {(tmp_path / f"saved-{rank}").read_text() for rank in (0, 1)} == {str(int(number))}
    assert signal.getsignal(number) is before


def test_a_signal_to_another_process_is_not_the_end_of_the_run(start: Callable[..., None], tmp_path: Path) -> None:
    """As where another machine has to go: all processes end well, and this command was told nothing."""

    def send() -> None:
        if _both_ready(tmp_path):
            for rank in (0, 1):
                os.kill(int((tmp_path / f"ready-{rank}").read_text()), signal.SIGTERM)

    thread = threading.Thread(target=send, daemon=True)
    thread.start()
    with pytest.raises(LuthierError, match="before its last step. There is no checkpoint yet") as caught:
        start("0: wait, 1: wait")
    assert caught.value.exit_status == STOPPED_ELSEWHERE == 75
    thread.join(10)


@pytest.mark.parametrize(
    ("number", "ends", "what"),
    [
        (signal.SIGINT, KeyboardInterrupt, "sleep"),
        (signal.SIGTERM, SystemExit, "hang"),
        pytest.param(signal.SIGINT, KeyboardInterrupt, "hang", marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, SystemExit, "sleep", marks=pytest.mark.slow),
    ],
)
def test_a_signal_outside_of_training_or_a_second_one_ends_all(
    start: Callable[..., None],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    number: signal.Signals,
    ends: type[BaseException],
    what: str,
) -> None:
    with sent(tmp_path, number, *([number] if what == "hang" else [])), pytest.raises(ends) as caught:
        start(f"0: {what}, 1: {what}")
    if isinstance(caught.value, SystemExit):
        assert caught.value.code == 128 + number
        assert caplog.text.count("stopped by SIGTERM outside of training") == 1
    for rank in (0, 1):
        with pytest.raises(ProcessLookupError):
            os.kill(int((tmp_path / f"ready-{rank}").read_text()), 0)


def test_cores_are_shared_out(
    start: Callable[..., None], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[dict[str, str]] = []
    popen = subprocess.Popen

    def noted(command: list[str], *, env: dict[str, str], **options: Any) -> Any:
        given.append(env)
        return popen(command, env=env, **options)

    monkeypatch.setattr(launching.subprocess, "Popen", noted)
    monkeypatch.setattr(launching.torch, "get_num_threads", lambda: 7)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    caplog.set_level(logging.INFO, logger="luthier")
    start("all train")
    assert "2 processes on the CPU, 3 threads each (OMP_NUM_THREADS)" in caplog.text
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    start("all train")
    assert [env["OMP_NUM_THREADS"] for env in given] == ["3", "3", "5", "5"]
    assert [(env["RANK"], env["LOCAL_RANK"], env["WORLD_SIZE"], env["MASTER_ADDR"]) for env in given[:2]] == [
        ("0", "0", "2", "127.0.0.1"),
        ("1", "1", "2", "127.0.0.1"),
    ]


@pytest.mark.slow
def test_processes_whose_launcher_is_killed_save_and_end(tmp_path: Path) -> None:
    code = (
        f"{IMPORTS}"
        f"run_in_processes(_config(Path({str(tmp_path)!r}), '0: wait, 1: wait'), 2, module=STUB)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    launcher = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=environment, stderr=subprocess.PIPE)
    try:
        assert _both_ready(tmp_path)
    finally:
        launcher.kill()
    _, said = launcher.communicate(timeout=20)  # up to the end of all that have its standard error
    assert b"the process that has started this run is gone" in said
    assert {(tmp_path / f"saved-{rank}").read_text() for rank in (0, 1)} == {str(int(signal.SIGTERM))}
    assert not list(tmp_path.glob("luthier-launch-*"))


@pytest.mark.slow
@pytest.mark.parametrize("fixed", [True, False], ids=["node_rank", "c10d"])
def test_two_machines_meet(tmp_path: Path, fixed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both are this one; with --node-rank the ranks are in its order."""
    from torch.distributed import TCPStore

    port = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False).port
    code = (
        f"{IMPORTS}machine, folder = sys.argv[1:]\n"
        "config = _config(Path(folder), '0: speak, 1: speak')\n"
        f"run_in_processes(config, 1, 2, int(machine) if {fixed} else None, 'localhost:{port}', module=STUB)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    both = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(machine), str(tmp_path)],
            cwd=ROOT,
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for machine in (1, 0)
    ]
    said = [process.communicate(timeout=60)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert sorted("rank 1: something is odd" in each for each in said) == [False, True]
    if fixed:
        assert "rank 1: something is odd" in said[0]


# --- what the ends come to, where real processes would hardly come to it ----------------------------------------------


def _ended(rank: int, code: int, tmp_path: Path, **report: Any) -> Ended:
    told = Report(**{"text": "t", "status": 1, "time": 0.0, **report}) if report else None
    return Ended(rank, 100 + rank, code, tmp_path / f"rank-{rank}.log", told)


@pytest.mark.parametrize(
    ("ends", "first"),
    [
        # Of two errors the earlier one; an error before what NCCL's watchdog does to its neighbours.
        ([(0, 1, {"time": 2.0, "text": "zero"}), (1, 1, {"time": 1.0, "text": "one"})], "rank 1: one"),
        ([(0, -signal.SIGABRT, {}), (1, 1, {"time": 1.0, "text": "one"})], "rank 1: one"),
        # Who was killed before all that follows from it.
        ([(0, 1, {"time": 1.0, "text": "zero"}), (1, -signal.SIGBUS, {})], "rank 1 .*SIGBUS, often because shared mem"),
        ([(0, 1, {"text": "lost", "consequence": True}), (1, -signal.SIGABRT, {})], "rank 1 .*SIGABRT"),
        # The cause is on another machine.
        ([(0, 1, {"text": "lost", "consequence": True})], "^lost. Go on so$"),
        ([(0, -63, {})], "killed by signal 63"),
        ([(0, 143, {}), (1, 0, {})], "rank 0 .* was ended by SIGTERM"),
    ],
)
def test_the_cause_goes_before_its_consequences(tmp_path: Path, ends: list[Any], first: str) -> None:
    with pytest.raises(LuthierError, match=first):
        raise failure([_ended(rank, code, tmp_path, **report) for rank, code, report in ends], "Go on so")


def test_the_last_word_of_a_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert last_said(log) == ("", False)
    log.write_text("\n \n")
    assert last_said(log) == ("", False)
    log.write_text("one\n\x1b two \n\n")
    assert last_said(log) == ("\x1b two", True)


def test_errors_of_torch_that_are_consequences() -> None:
    from torch.distributed import DistBackendError, DistNetworkError, TCPStore

    with pytest.raises(DistNetworkError) as caught:
        TCPStore("127.0.0.1", 1, is_master=False, timeout=launching.torch.distributed.default_pg_timeout / 3000)
    assert is_consequence(caught.value) and is_consequence(DistBackendError("x"))
    assert is_consequence(ConnectionResetError("Connection reset by peer"))
    assert not is_consequence(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_consequence(ValueError("Connection closed by peer"))


def test_a_port_that_torch_would_not_share_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the system gives out a port again that a store had before: the agent could not listen there."""
    asked: list[int] = []

    def given(host: str, port: int, **options: Any) -> TCPStore:
        asked.append(port)
        return TCPStore(host, port, **{**options, "multi_tenant": len(asked) > 1})

    monkeypatch.setattr(launching, "TCPStore", given)
    store = launching._shared_store()
    assert asked[0] == asked[2] == 0 and asked[1] != asked[3] == store.port
