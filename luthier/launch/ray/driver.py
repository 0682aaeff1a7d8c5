"""The command's part of a run under Ray: find or start a cluster, have Ray Train's workers made, and say what they say.

Ray Train watches the workers and makes them again after a failure, up to `--max-failures` times; each time they go on
from the last checkpoint in the run folder (`worker.going_on`). What the command hears of it comes over the desk.
"""

from __future__ import annotations

import io
import logging
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from luthier.config import Config
from luthier.errors import ConfigError, RunError
from luthier.launch.ended import how_to_go_on
from luthier.launch.ray import ended
from luthier.launch.ray.desk import Desk
from luthier.launch.ray.ended import Failure
from luthier.train.distributed import Processes

log = logging.getLogger("luthier")

# All that goes through Ray's shared memory is the config; Ray would take a third of the machine's memory for it.
_OBJECT_STORE_BYTES = 2**27
_POLL_SECONDS = 0.2
_REACH_SECONDS = 10.0
# A worker in its steps answers a signal in this time; others have nothing to save.
_ANSWER_SECONDS = 5.0
# Until it is said that there is no room for the workers.
_ROOM_SECONDS = 180.0


@dataclass(frozen=True)
class Workers:
    """What is asked of Ray: how many workers, and what each of them needs."""

    number: int
    cpus: int = 1
    gpus: int = 0

    @property
    def needs(self) -> dict[str, float]:
        return {"CPU": float(self.cpus)} | ({"GPU": float(self.gpus)} if self.gpus else {})

    def __str__(self) -> str:
        each = f"{self.cpus} {'CPU' if self.cpus == 1 else 'CPUs'}{' and 1 GPU' if self.gpus else ''}"
        return f"{self.number} {'worker' if self.number == 1 else 'workers'} with {each} each"


def train(config: Config, num_workers: int | None, max_failures: int) -> None:
    """See `luthier.launch.ray.train`."""
    Processes(0, num_workers or 1).check(config)
    address = os.environ.get("RAY_ADDRESS", "")
    if address.startswith("ray://"):
        raise ConfigError(
            f"RAY_ADDRESS is {address}, and a run cannot be watched through Ray's client: submit this command to the "
            "cluster (ray job submit -- luthier train ...), or run it on one of the cluster's machines"
        )
    storage = tempfile.mkdtemp(prefix="luthier-ray-")
    try:
        with _signals() as signals, redirect_stdout(_Aside()), _cluster(config, num_workers, address) as workers:
            Processes(0, workers.number).check(config)
            _Run(config, workers, max_failures, signals, storage).watch()
    finally:
        shutil.rmtree(storage, ignore_errors=True)


# --- the cluster ------------------------------------------------------------------------------------------------------


@contextmanager
def _cluster(config: Config, asked: int | None, address: str) -> Iterator[Workers]:
    """A connection to a cluster, and the workers that it is to have."""
    # Read once, when Ray is imported: its second generation of Train, the caller's folder, and a plain `print`.
    os.environ |= {"RAY_TRAIN_V2_ENABLED": "1", "RAY_CHDIR_TO_TRIAL_DIR": "0", "RAY_TRAIN_ENABLE_PRINT_PATCH": "0"}
    try:
        import ray

        import luthier.launch.ray.worker  # noqa: F401 - with all that it needs of Ray
    except ImportError as error:
        raise ConfigError(
            f"--launcher ray needs Ray Train 2.60 or later ({error}): pip install 'luthier[ray]'"
        ) from error

    try:
        try:
            workers, where = _connect(config, asked, address)
        except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
            raise RunError(
                f"Ray's cluster{f' at {address}' if address else ''} cannot be reached or started: "
                f"{_first_line(error)}. Look at RAY_ADDRESS, and at `ray status`; RAY_ADDRESS=local starts one on this "
                "machine"
            ) from error
        log.info("Ray: %s, %s", workers, where)
        yield workers
    finally:
        ray.shutdown()


def _connect(config: Config, asked: int | None, address: str) -> tuple[Workers, str]:
    """Connect to a cluster that is there, or start one; gives its workers and where they will be."""
    import ray

    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.CRITICAL}
    if address and address != "local":
        _check_reachable(address)
        ray.init(address, **quiet)
    else:
        here, gpus = _workers_here(config, asked)
        own = dict(num_cpus=here.cpus * here.number, num_gpus=here.gpus * here.number, include_dashboard=False)
        try:
            ray.init(address or None, **own, object_store_memory=_OBJECT_STORE_BYTES, **quiet)
        except ValueError:  # Ray's way to say that `ray start` was here: that cluster has its sizes already
            ray.init(**quiet)
        else:
            if here.gpus and here.number > gpus:
                raise ConfigError(
                    f"--num-workers {asked}: this machine shows {gpus} GPUs, and each worker takes one; with "
                    "device_map: cpu they compute on the CPU"
                )
            return here, "on this machine"
    return _workers_of(ray.cluster_resources(), config, asked), "in the cluster that is there"


def _check_reachable(address: str) -> None:
    """Raises ConnectionError or ValueError at once; Ray would try for minutes."""
    if address != "auto":
        host, _, port = address.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), _REACH_SECONDS).close()
        except OSError as error:
            raise ConnectionError(error.strerror or str(error)) from error


def _on_cpu(config: Config) -> bool:
    return config.model.device_map in ("cpu", {"": "cpu"})


def _workers_here(config: Config, asked: int | None) -> tuple[Workers, int]:
    """The workers of a cluster that is this machine alone, whose cores are divided among them; and its GPUs."""
    import torch

    gpus = 0 if _on_cpu(config) else torch.cuda.device_count()
    number = asked or gpus or 1
    return Workers(number, max(1, torch.get_num_threads() // number), 1 if gpus else 0), gpus


def _workers_of(resources: dict[str, float], config: Config, asked: int | None) -> Workers:
    """The workers of a cluster that is there already.

    Args:
        resources: of all its machines.
    """
    gpus = 0 if _on_cpu(config) else int(resources.get("GPU", 0))
    workers = Workers(asked or gpus or 1, gpus=1 if gpus else 0)
    for name, each in workers.needs.items():
        if each * workers.number > (there := resources.get(name, 0)):
            log.warning("%s, and the cluster has %g %ss now: the run waits until it has more", workers, there, name)
    return workers


class _Aside(io.TextIOBase):
    """Where Ray prints that a worker has died, with all that may be behind it; the run says which and why."""

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        if text.strip():
            log.debug("Ray: %s", text.strip())
        return len(text)


# --- the run ----------------------------------------------------------------------------------------------------------


@dataclass
class _Signals:
    """What came while it was entered. first: the first signal; 0: none. again: whether there was a second one."""

    first: int = 0
    again: bool = False

    def note(self, number: int, frame: FrameType | None) -> None:
        self.first, self.again = self.first or number, bool(self.first)


@contextmanager
def _signals() -> Iterator[_Signals]:
    """Signals are noted while the workers run, see `_Run`; what was there before Ray came is put back."""
    if threading.current_thread() is not threading.main_thread():  # elsewhere Python cannot set handlers
        yield _Signals()
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield _Signals()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclass
class _Run:
    """One run, as the command sees it.

    Attributes:
        storage: an empty folder for Ray Train, which is handed no checkpoints. places: rank -> process and machine.
        failures: of the last attempt that failed, empty while one goes on well; failed: the places of that attempt.
        saves: whether the workers save a checkpoint since they were asked to stop.
    """

    config: Config
    workers: Workers
    max_failures: int
    signals: _Signals
    storage: str
    attempt: int = 0
    places: dict[int, str] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)
    failed: dict[int, str] = field(default_factory=dict)
    saves: bool = False
    _problem: BaseException | None = None

    @property
    def folder(self) -> Path:
        return Path(self.config.output.output_dir).expanduser()

    def watch(self) -> None:
        """Start the workers, and say what they say until they have ended."""
        import ray
        from ray.exceptions import RayError
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        desk = ray.remote(num_cpus=0, scheduling_strategy=here)(Desk).remote()
        fitting = threading.Thread(target=self._fit, args=(desk,), daemon=True)
        try:
            if threading.current_thread() is threading.main_thread():
                for number in (signal.SIGINT, signal.SIGTERM):
                    signal.signal(number, self.signals.note)
            began, asked = time.monotonic(), 0.0
            fitting.start()
            while fitting.is_alive():
                fitting.join(_POLL_SECONDS)
                self._hear(ray.get(desk.take.remote()))
                if not self.attempt and began and time.monotonic() - began > _ROOM_SECONDS:
                    log.warning("none has begun yet: `ray status` says whether there is room for %s", self.workers)
                    began = 0.0
                if self.signals.first and not asked:
                    ray.get(desk.ask.remote(self.signals.first))
                    asked = time.monotonic()
                if asked and (self.signals.again or (not self.saves and time.monotonic() > asked + _ANSWER_SECONDS)):
                    self._end_at_once()
            self._hear(ray.get(desk.take.remote()))
        except (RayError, ConnectionError) as error:
            lost = f"the connection to Ray is lost: {_first_line(error)}"
            raise RunError(f"{lost}. {how_to_go_on(self.folder)}") from error
        if self._problem is not None:
            self._raise()

    def _fit(self, desk: Any) -> None:
        """Have Ray Train train; in a thread, since it does not return before the end."""
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchTrainer

        from luthier.launch.ray.worker import Job, Meeting, Watch, work

        try:
            trainer = TorchTrainer(
                work,
                train_loop_config={"job": Job(self.config, os.getcwd(), desk)},
                torch_config=Meeting(),
                scaling_config=ScalingConfig(
                    num_workers=self.workers.number,
                    use_gpu=bool(self.workers.gpus),
                    resources_per_worker=self.workers.needs,
                ),
                run_config=RunConfig(
                    name="luthier",
                    storage_path=self.storage,
                    failure_config=FailureConfig(max_failures=self.max_failures),
                    callbacks=[Watch(desk)],
                ),
            )
            trainer.fit()
        except BaseException as error:  # whatever it is, the main thread tells it
            self._problem = error

    def _hear(self, events: list[tuple[Any, ...]]) -> None:
        for kind, *rest in events:
            if kind == "said":
                print(rest[0], file=sys.stderr, flush=True)
            elif kind == "asked":
                self.saves = self.saves or rest[0]
            elif kind == "failed":
                (self.failures,) = rest
                self.failed, self.places = self.places, {}  # the next attempt's come soon
            elif kind == "begins":
                rank, self.places[rank], attempt = rest
                if rank == 0:
                    self._begins(attempt)

    def _begins(self, attempt: int) -> None:
        self.attempt = attempt
        if attempt > 1:
            why = ended.in_short(self.failures, self.failed) if self.failures else "a machine is taken away"
            log.warning("%s. The run begins again: attempt %d, --max-failures %d", why, attempt, self.max_failures)
        self.failures = []

    def _end_at_once(self) -> None:
        if self.signals.first == signal.SIGINT:
            raise KeyboardInterrupt
        log.warning("stopped by SIGTERM outside of training. %s", how_to_go_on(self.folder))
        raise SystemExit(128 + self.signals.first)

    def _raise(self) -> None:
        if self.failures:
            told = ended.final(self.failures, self.failed, self.folder, self.attempt, self.max_failures)
            raise told from self._problem
        cause = getattr(self._problem, "controller_failure", self._problem)
        assert cause is not None
        raise RunError(f"Ray has ended the run: {_first_line(cause)}. {how_to_go_on(self.folder)}") from self._problem


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
