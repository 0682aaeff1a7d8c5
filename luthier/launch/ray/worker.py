"""What runs in Ray's processes: the training function of each worker, and what connects it with the command.

Ray Train makes the workers, numbers them, watches them and makes them again when one fails. Its TorchTrainer would open
torch's process group as well; here it only says where the workers meet (`Meeting`), since a run has the process group
that it needs made by `train.distributed`, after the data is prepared and with its own time-outs.

A worker trains in a thread, where no signal arrives, and what it writes goes to a file of Ray's. Lines and wishes go
through one small actor instead, the desk.
"""

from __future__ import annotations

import io
import logging
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import ray
from ray.exceptions import RayError
from ray.train import UserCallback, get_context
from ray.train.backend import Backend
from ray.train.collective import barrier, broadcast_from_rank_zero
from ray.train.torch import TorchConfig

from luthier.cli import Plain, explained
from luthier.config import Config
from luthier.errors import ConfigError, DataError, ModelError, RunError
from luthier.launch.ended import Report, is_consequence
from luthier.launch.ray.ended import Failure, how_it_was_lost

log = logging.getLogger("luthier")

_POLL_SECONDS = 0.5
# One that has lost the others waits: Ray may not have seen yet that another is gone, which is the cause.
_PATIENCE_SECONDS = 6.0
# The same config fails again in the same way.
_FINAL = (ConfigError, DataError, ModelError)


@dataclass(frozen=True)
class Job:
    """What each worker gets.

    Attributes:
        directory: that relative paths of the config start from. desk: the actor's handle.
    """

    config: Config
    directory: str
    desk: Any


class WorkerFailed(Exception):
    """An error as a worker tells it: of plain values, so that it can be read wherever it gets to."""

    def __init__(self, report: Report, again: bool) -> None:
        super().__init__(report, again)
        self.report, self.again = report, again

    def __str__(self) -> str:
        return self.report.text


# --- where the workers meet -------------------------------------------------------------------------------------------


class Meeting(TorchConfig):
    """In place of torch's process group: what a launcher sets in the environment of its processes."""

    @property
    def backend_cls(self) -> type[Backend]:
        return _Environment


class _Environment(Backend):
    # Each worker sees the GPUs of all workers on its machine, and LOCAL_RANK says which is its own.
    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: Meeting) -> None:
        address = worker_group.execute_single(0, _free_address)
        worker_group.execute(_set_environment, *address)


def _free_address() -> tuple[str, int]:
    with socket.socket(socket.AF_INET6 if socket.has_ipv6 else socket.AF_INET) as probe:
        probe.bind(("", 0))
        port: int = probe.getsockname()[1]
    return ray.util.get_node_ip_address(), port


def _set_environment(host: str, port: int) -> None:
    context = get_context()
    values = {
        "MASTER_ADDR": host,
        "MASTER_PORT": port,
        "RANK": context.get_world_rank(),
        "WORLD_SIZE": context.get_world_size(),
        "LOCAL_RANK": context.get_local_rank(),
        "LOCAL_WORLD_SIZE": context.get_local_world_size(),
        "GROUP_RANK": context.get_node_rank(),
    }
    os.environ.update({name: str(value) for name, value in values.items()})


# --- a worker ---------------------------------------------------------------------------------------------------------


def work(loop_config: dict[str, Any]) -> None:
    """Train as one of Ray's workers.

    Raises:
        WorkerFailed: training has failed.
    """
    job: Job = loop_config["job"]
    rank = get_context().get_world_rank()
    ended = threading.Event()
    if rank == 0:  # the processes of a run agree on stopping
        threading.Thread(target=_stop_when_asked, args=(job.desk, ended), daemon=True).start()
    with _told(rank, job.desk):
        try:
            if Path(job.directory).is_dir():
                os.chdir(job.directory)
            config = _config_of_attempt(job, rank)
            check_folder(Path(config.output.output_dir).expanduser())
            from luthier.train.run import train

            train(config)
        except BaseException as error:
            consequence = is_consequence(error)
            failed = WorkerFailed(_report(error, consequence), not isinstance(error, _FINAL))
            if consequence:
                time.sleep(_PATIENCE_SECONDS)
            raise failed from None
        finally:
            ended.set()


def _config_of_attempt(job: Job, rank: int) -> Config:
    """The config, which from the second attempt on goes on with what the first has begun."""
    place = f"process {os.getpid()} on {socket.gethostname()}"
    folder = Path(job.config.output.output_dir).expanduser()
    attempt, before = 1, None
    if rank == 0:
        now = _stamp(folder)
        attempt, before = ray.get(job.desk.begin.remote(now))
    ray.get(job.desk.put.remote("begins", rank, place, attempt))
    # The first process alone opens the folder, and tells the others where to go on from.
    return job.config if attempt == 1 else going_on(job.config, folder, replaced=before is None or now != before)


def _stamp(folder: Path) -> tuple[int, int] | None:
    """What tells one run in a folder from the next, which writes a config.yaml when it has replaced the one before."""
    try:
        found = (folder / "config.yaml").stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ino


def going_on(config: Config, folder: Path, *, replaced: bool) -> Config:
    """The config of a run that begins again after a failure.

    Args:
        replaced: whether what is in the folder is this run's, and not one that it had yet to overwrite.
    """
    if not replaced:
        return config
    elsewhere = config.output.resume_from_checkpoint
    if elsewhere not in (None, False, True, "auto") and not any(folder.glob("checkpoint-*")):
        return config.replace("begun again after a failure", overwrite_output_dir=True)
    return config.replace("begun again after a failure", resume_from_checkpoint="auto")


def check_folder(folder: Path) -> None:
    """Raises ConfigError if workers are on several machines, and the folder of the run is not one for all of them."""
    context = get_context()
    if context.get_local_world_size() == context.get_world_size():
        return
    probe = None
    if context.get_world_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".partial-{uuid4().hex}"
        probe.touch()
    name = broadcast_from_rank_zero(probe and str(probe))
    there = Path(name).exists()
    barrier()
    if probe is not None:
        probe.unlink()
    if not there:
        raise ConfigError(
            f"output_dir: {folder} on {socket.gethostname()} is not the folder of that name where rank 0 runs. After "
            "a failure Ray may put any worker on any machine: output_dir has to be on a file system that all of them "
            "share"
        )


def _report(error: BaseException, consequence: bool) -> Report:
    heading, text, status = explained(error, debug=True)
    if heading != "error":
        text = f"{heading}: {text} (--debug shows where; please report it)"
    return Report(text, status, time.time(), consequence, "".join(traceback.format_exception(error)))


def _stop_when_asked(desk: Any, ended: threading.Event) -> None:
    from luthier.train import interrupt

    try:
        while not ended.wait(_POLL_SECONDS):
            if number := ray.get(desk.asked.remote()):
                in_steps = interrupt.request(number)
                ray.get(desk.put.remote("asked", in_steps))
                if in_steps:
                    return
    except RayError:  # the command is gone, and Ray is about to end its workers
        return


# --- what workers say -------------------------------------------------------------------------------------------------


class _Lines(io.TextIOBase):
    """A text stream to the desk, line by line."""

    def __init__(self, desk: Any) -> None:
        super().__init__()
        self._desk, self._rest, self._lock = desk, "", threading.Lock()
        self._last: Any = None

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        with self._lock:
            *lines, self._rest = (self._rest + text).split("\n")
            for line in lines:
                # Of a progress bar that is drawn over and over the last state is enough.
                self._last = self._desk.put.remote("said", line.rstrip("\r").rpartition("\r")[2])
        return len(text)

    def deliver(self) -> None:
        """Wait until all of it is there: a worker that fails is killed soon."""
        if self._rest:
            self.write("\n")
        if self._last is not None:
            ray.get(self._last)


@contextmanager
def _told(rank: int, desk: Any) -> Iterator[None]:
    """While entered, the first worker writes to the terminal of the command; of the others warnings and errors get
    there. Their logs are kept by Ray as well."""
    lines = _Lines(desk)
    shown, kept = logging.StreamHandler(lines), logging.StreamHandler(sys.stderr)
    for handler in (shown, kept):
        handler.setFormatter(Plain("%(message)s"))
        log.addHandler(handler)
    shown.setLevel(logging.WARNING if rank else logging.INFO)
    log.setLevel(logging.INFO)
    log.propagate = False
    with ExitStack() as stack:
        if rank == 0:
            stack.enter_context(redirect_stdout(lines))
            stack.enter_context(redirect_stderr(lines))
        try:
            yield
        finally:
            for handler in (shown, kept):
                log.removeHandler(handler)
            lines.deliver()


# --- in Ray's controller ----------------------------------------------------------------------------------------------


class Watch(UserCallback):
    """Tells the command which workers have failed; no other attempt is made where it cannot help or is not wanted."""

    def __init__(self, desk: Any) -> None:
        self.desk = desk

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        failures = [_failure(rank, error) for rank, error in worker_exceptions.items()]
        ray.get(self.desk.put.remote("failed", failures))
        if not all(each.again for each in failures) or ray.get(self.desk.asked.remote()):
            raise RunError("no other attempt")  # what a callback raises ends the run


def _failure(rank: int, error: Exception) -> Failure:
    if isinstance(error, WorkerFailed):
        return Failure(rank, error.report, again=error.again)
    inner = getattr(error, "health_check_failure", error)
    return Failure(rank, lost=how_it_was_lost(type(inner).__name__, str(inner)))
