"""The script of the container, run by bash with programs that stand in for luthier and getent."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from luthier.launch.ended import STOPPED_ELSEWHERE
from luthier.launch.kubernetes import manifests

LUTHIER = """\
#!/bin/bash
echo "$*" >> "$LOG"
if [[ $1 == "${WAITS:-}" ]]; then
    trap 'echo saved >> "$LOG"; exit 0' TERM
    for ((i = 0; i < 600; i++)); do /bin/sleep 0.05; done
fi
if [[ $1 == "${FAILS:-}" ]]; then exit "${STATUS:-7}"; fi
"""
GETENT = """\
#!/bin/bash
echo "getent $*" >> "$LOG"
[[ $(grep -c getent "$LOG") -ge 2 ]]
"""
SLEEP = "#!/bin/bash\nexec /bin/sleep ${NAP:-0.05}\n"
Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(tmp_path: Path) -> Start:
    """start(*arguments, **variables): the script, with its folders below the test's."""
    programs = tmp_path / "programs"
    programs.mkdir()
    for name, text in {"luthier": LUTHIER, "getent": GETENT, "sleep": SLEEP}.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    script = manifests.script()
    for folder in ("/luthier", "/config"):
        script = script.replace(f"={folder}/", f"={tmp_path}{folder}/").replace(f'"{folder}/', f'"{tmp_path}{folder}/')
    (tmp_path / "run.sh").write_text(script)

    def run(*arguments: str, **variables: str) -> subprocess.Popen[str]:
        environment = {
            "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
            "LOG": str(tmp_path / "log"),
            "CONFIG": "cfg.yml",
            "RUN": "first",
            "NUM_PROCESSES": "3",
            "JOB_UID": "job-1",
            **variables,
        }
        return subprocess.Popen(
            ["bash", str(tmp_path / "run.sh"), *arguments], env=environment, stderr=subprocess.PIPE, text=True
        )

    return run


@pytest.fixture
def said(tmp_path: Path) -> Callable[[], list[str]]:
    """What the programs were asked, with the test's folder left out."""

    def read() -> list[str]:
        log = tmp_path / "log"
        return log.read_text().replace(str(tmp_path), "").splitlines() if log.exists() else []

    return read


Said = Callable[[], list[str]]


def _until_said(said: Said, lines: int) -> None:
    deadline = time.monotonic() + 20
    while len(said()) < lines and time.monotonic() < deadline:
        time.sleep(0.02)


TRAIN = "train /config/cfg.yml --num-processes 3 --output_dir /luthier/runs/first --resume_from_checkpoint auto"
MERGE = "merge-lora /luthier/runs/first --overwrite"


def test_train_merge_push(start: Start, said: Said) -> None:
    process = start("lora_r=8", "x=a b", MERGE="true", PUSH="ada/first", BASE_MODEL="owner/model")
    assert process.wait(30) == 0
    assert said() == [
        TRAIN.replace("--output_dir", "lora_r=8 x=a b --output_dir") + " --base_model owner/model",
        MERGE,
        "push /luthier/runs/first ada/first --merged",
    ]


def test_without_a_merge_the_adapter_is_pushed(start: Start, said: Said) -> None:
    assert start(MERGE="false", PUSH="ada/first").wait(30) == 0
    assert said() == [TRAIN, "push /luthier/runs/first ada/first"]


def test_nothing_follows_a_failure_and_its_status_is_the_script_s(start: Start, said: Said) -> None:
    assert start(MERGE="true", PUSH="ada/first", FAILS="train").wait(30) == 7
    assert said() == [TRAIN]
    assert start(MERGE="true", PUSH="ada/first", FAILS="merge-lora").wait(30) == 7
    assert said() == [TRAIN, TRAIN, MERGE]


def test_a_pod_that_comes_back_after_the_training_does_not_train_again(start: Start, said: Said) -> None:
    assert start(MERGE="true", FAILS="merge-lora").wait(30) == 7
    assert start(MERGE="true").wait(30) == 0
    assert said() == [TRAIN, MERGE, MERGE]
    # Another job of that name goes on with the run: it may have been given more epochs.
    assert start(MERGE="true", JOB_UID="job-2").wait(30) == 0
    assert said()[3:] == [TRAIN, MERGE]


def test_sigterm_reaches_the_training_and_the_pod_counts_as_ended(start: Start, said: Said) -> None:
    process = start(MERGE="true", WAITS="train")
    _until_said(said, 1)
    time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    # The training itself ends well, and still nothing may follow it.
    assert process.wait(30) == 128 + signal.SIGTERM
    assert said() == [TRAIN, "saved"]
    assert "goes on from here" in process.stderr.read()  # type: ignore[union-attr]
    assert start(MERGE="true").wait(30) == 0
    assert said()[2:] == [TRAIN, MERGE]


def test_several_nodes_wait_for_the_first_which_alone_merges(start: Start, said: Said) -> None:
    nodes = {"NODES": "2", "RDZV_ENDPOINT": "first-0.first:29500", "MERGE": "true", "PUSH": "ada/first"}
    second = start(**nodes, JOB_COMPLETION_INDEX="1")
    _until_said(said, 3)
    meets = "--nnodes 2 --node-rank {} --rdzv-endpoint first-0.first:29500"
    *looked_for, train = said()
    assert looked_for == ["getent hosts first-0.first"] * 2
    assert train == TRAIN.replace("--output", f"{meets.format(1)} --output")
    assert start(**nodes, JOB_COMPLETION_INDEX="0").wait(30) == second.wait(30) == 0
    assert said()[4:] == [
        TRAIN.replace("--output", f"{meets.format(0)} --output"), MERGE, "push /luthier/runs/first ada/first --merged",
    ]  # fmt: skip
    # Its pod is started again after the training is over: nobody would meet it.
    assert start(**nodes, JOB_COMPLETION_INDEX="1").wait(30) == 0
    assert len(said()) == 7


def test_a_run_that_another_node_has_stopped_is_not_over(start: Start, said: Said, tmp_path: Path) -> None:
    """Neither for node 0, which would merge what is not trained yet, nor for the others, whom the next one needs."""
    nodes = {"NODES": "2", "RDZV_ENDPOINT": "first-0.first:29500", "MERGE": "true"}
    status = str(STOPPED_ELSEWHERE)
    for node in ("0", "1"):
        ended = start(**nodes, JOB_COMPLETION_INDEX=node, FAILS="train", STATUS=status).wait(30)
        assert ended == STOPPED_ELSEWHERE
    assert not [line for line in said() if line.startswith("merge")]
    # All is trained on node 1, and then node 0 is gone before it has written the result.
    process = start(**nodes, JOB_COMPLETION_INDEX="1", NAP="0.001")
    assert process.wait(30) == STOPPED_ELSEWHERE
    assert "joins it again" in process.stderr.read()  # type: ignore[union-attr]
    assert not list(tmp_path.glob("luthier/runs/.first.trained"))


@pytest.mark.parametrize("missing", ["RUN", "CONFIG"])
def test_what_is_missing_is_named(start: Start, said: Said, missing: str) -> None:
    process = start(**{missing: ""})
    assert process.wait(30) != 0
    assert missing in process.stderr.read()  # type: ignore[union-attr]
    assert said() == []
