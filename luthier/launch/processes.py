"""One process for each device, with torch's elastic agent (what torchrun runs) as their parent.

torch's agent brings machines together, gives out the ranks and holds the store that the processes meet in. To start,
watch and end the processes is left to subclasses (its documentation, "Extending the Agent"); here it is otherwise than
torchrun has it:

- Signals reach each process once. They are in sessions of their own, so that Ctrl-C goes to the launcher alone, which
  hands it on and then waits for as long as saving a checkpoint takes. A second signal ends all at once.
- When one fails the others are told, and have some seconds to end by themselves: they may be writing down what to go on
  with. Then they are killed; a collective that waits for a lost process would hear nothing else.
- Nothing is started again: the same command goes on from the last checkpoint.
- One message says what happened (`launch.ended`), and not a table or N tracebacks.

The data is tokenised by the first process while the others wait (`Processes.in_turn`), before they connect. If the
launcher did it, it would have to import what the processes import meanwhile, and keep it in memory beside them.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch.distributed import TCPStore
from torch.distributed.elastic.agent.server.api import (
    RunResult,
    SimpleElasticAgent,
    WorkerGroup,
    WorkerSpec,
    WorkerState,
)
from torch.distributed.elastic.rendezvous import RendezvousParameters
from torch.distributed.elastic.rendezvous.api import RendezvousError
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

from luthier.config import Config
from luthier.errors import ConfigError, RunError
from luthier.launch.asked import host_and_port
from luthier.launch.ended import Ended, Report, failure, how_to_go_on, stopped_elsewhere
from luthier.launch.worker import Job, log_of, report_of, stopped_of
from luthier.train.distributed import Processes

log = logging.getLogger("luthier")

WORKER = "luthier.launch.worker"
# For the others to end by themselves when one has failed; how long machines wait for each other.
_SETTLE_SECONDS = 5.0
_MEETING_SECONDS = 900
_POLL_SECONDS = 0.05


def number_of_processes(config: Config, asked: int | None) -> int:
    """How many processes a config trains in on this machine: as asked, or one for each GPU that it may use.

    Raises:
        ConfigError: there are fewer GPUs, or the devices are no CUDA devices and no CPU.
    """
    asked_for = config.model.device_map
    device = asked_for[""] if isinstance(asked_for, dict) else asked_for
    gpus = 0 if device == "cpu" else torch.cuda.device_count()  # of those that CUDA_VISIBLE_DEVICES leaves
    if asked is None:
        return gpus if gpus and device in (None, "auto", "cuda") else 1
    if gpus and asked > gpus:
        raise ConfigError(
            f"--num-processes {asked}: this machine shows {gpus} GPUs, and each process takes one; with "
            "device_map: cpu they compute on the CPU"
        )
    if asked > 1 and device != "cpu" and not gpus and torch.backends.mps.is_available():
        raise ConfigError("mps computes in one process only: leave --num-processes out, or write device_map: cpu")
    return asked


def run_in_processes(
    config: Config,
    processes: int,
    machines: int = 1,
    machine: int | None = None,
    endpoint: str | None = None,
    *,
    module: str | None = None,
) -> None:
    """Train in several processes of this machine, and wait for their end.

    Args:
        processes: on this machine. machines: that run this command; machine: which of them this is, if that is fixed.
        endpoint: HOST:PORT where several machines meet. module: what each process runs (default: `WORKER`).

    Raises:
        LuthierError: a process has failed, or a signal that did not come here has stopped the run before its last
            step; the text is the one message of the run. KeyboardInterrupt, SystemExit: a signal ended the run outside
            of its steps, as it ends a single process.
    """
    Processes(0, processes * machines).check(config)
    threads = _threads(processes)
    on_cpu = config.model.device_map in ("cpu", {"": "cpu"}) or not torch.cuda.is_available()
    where = f"{processes} {'process' if processes == 1 else 'processes'} {'on the CPU' if on_cpu else 'on GPUs'}"
    where += threads[1] and f", {threads[1]}"
    log.info("%s%s", where, f"; waiting for {machines} machines at {endpoint}" if machines > 1 else "")
    output = Path(config.output.output_dir).expanduser()
    folder = Path(tempfile.mkdtemp(prefix="luthier-launch-"))
    keep = False
    try:
        Job(config, os.getpid(), tuple(sys.argv)).write(folder)
        if machines == 1:
            store = _shared_store()  # as long as it is held, so is its port
            machine, endpoint = 0, f"127.0.0.1:{store.port}"
        assert endpoint is not None
        with _Signals() as signals:
            try:
                spec = _spec(processes, machines, machine, endpoint)
                agent = _Agent(spec, signals, folder, module or WORKER, threads[0])
                agent.run()
            except (RendezvousError, torch.distributed.DistError, TimeoutError) as error:
                if not signals.processes:
                    raise RunError(f"{machines} machines do not meet at {endpoint}: {_first_line(error)}") from error
                if not any(end.failed for end in agent.ends()):
                    raise RunError(
                        f"the machine of {endpoint} is gone: {_first_line(error)}. {how_to_go_on(output)}"
                    ) from error
        ends, go_on = agent.ends(), how_to_go_on(output)
        _raise_for(ends, signals, go_on)
        if stopped_of(folder).exists() and not signals.first:
            raise stopped_elsewhere(go_on)
    except RunError as error:
        keep = str(folder) in str(error)
        raise
    finally:
        if sys.stderr.isatty():
            print("\x1b[?25h", end="", file=sys.stderr)  # the cursor, which a progress bar that was killed has hidden
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)


def _raise_for(ends: list[Ended], signals: _Signals, go_on: str) -> None:
    """Nothing if all processes have ended well; else what says how they ended."""
    if all(end.code == 0 for end in ends):
        return
    number = signals.first
    if number and (signals.again or all(end.stopped or end.code in (0, -number, 128 + number) for end in ends)):
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        log.warning("stopped by SIGTERM outside of training. %s", go_on)
        raise SystemExit(128 + number)
    raise failure(ends, go_on)


def _threads(processes: int) -> tuple[dict[str, str], str]:
    """The environment that keeps processes from using each other's cores, and what to say of it."""
    if "OMP_NUM_THREADS" in os.environ:
        return {}, ""
    each = max(1, torch.get_num_threads() // processes)
    return {"OMP_NUM_THREADS": str(each)}, f"{each} {'thread' if each == 1 else 'threads'} each (OMP_NUM_THREADS)"


def _shared_store() -> TCPStore:
    """A store at a port that is free, which torch's agent in this process shares.

    torch remembers the ports of stores that are gone, and does not share a store at a port that the system has given
    out again; then another one is asked for.
    """
    for attempt in range(8):
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, multi_tenant=True)
        try:
            TCPStore("127.0.0.1", store.port, is_master=True, wait_for_workers=False, multi_tenant=True)
        except torch.distributed.DistNetworkError:
            if attempt == 7:
                raise
        else:
            break
    return store


def _spec(processes: int, machines: int, machine: int | None, endpoint: str) -> WorkerSpec:
    """What torch's agent has to know: how many processes, and how they find each other."""
    address: dict[str, Any] = {}
    settings: dict[str, Any]
    if machine is None:
        backend, settings = "c10d", {"join_timeout": _MEETING_SECONDS}
    else:
        backend, settings = "static", {"rank": machine, "timeout": _MEETING_SECONDS}
        address["master_addr"], address["master_port"] = host_and_port(endpoint)
    parameters = RendezvousParameters(
        backend=backend, endpoint=endpoint, run_id="luthier", min_nodes=machines, max_nodes=machines, **settings
    )
    return WorkerSpec(
        role="luthier",
        local_world_size=processes,
        rdzv_handler=get_rendezvous_handler(parameters),
        entrypoint=WORKER,
        max_restarts=0,
        monitor_interval=_POLL_SECONDS,
        **address,
    )


class _Signals:
    """While entered, SIGINT and SIGTERM are for the processes; as long as there are none, they end this one.

    Attributes:
        processes: by rank. first: the first signal; 0: none. again: whether a second one has ended all.
    """

    def __init__(self) -> None:
        self.processes: dict[int, subprocess.Popen[bytes]] = {}
        self.first, self.again = 0, False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> _Signals:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python cannot set handlers
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.getsignal(number)
        self.keep()
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def keep(self) -> None:
        """From now on there are no processes. What is waited for are other machines, in C++, where a handler of
        Python's would not be heard."""
        for number in self._before:
            signal.signal(number, signal.SIG_DFL)

    def hand_on(self) -> None:
        """From now on there are processes."""
        for number in self._before:
            signal.signal(number, self._handed_on)

    def _handed_on(self, number: int, frame: FrameType | None) -> None:
        running = [process for process in self.processes.values() if process.returncode is None]
        self.first, self.again = self.first or number, bool(self.first)
        for process in running:
            if self.again:
                _kill_group(process)
            else:
                process.send_signal(number)


class _Agent(SimpleElasticAgent):
    """Starts, watches and ends the processes of this machine."""

    def __init__(
        self, spec: WorkerSpec, signals: _Signals, folder: Path, module: str, environment: dict[str, str]
    ) -> None:
        super().__init__(spec)
        self._signals, self._processes = signals, signals.processes
        self._folder, self._module, self._environment = folder, module, environment
        self._stopped: set[int] = set()

    def ends(self) -> list[Ended]:
        """How each process has ended, in order of ranks."""
        return [
            Ended(
                rank,
                process.pid,
                process.wait(),
                log_of(self._folder, rank),
                Report.read(report_of(self._folder, rank)),
                rank in self._stopped,
            )
            for rank, process in self._processes.items()
        ]

    # --- what torch's agent asks for ----------------------------------------------------------------------------------

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        shared = {
            "WORLD_SIZE": worker_group.workers[0].world_size,
            "LOCAL_WORLD_SIZE": worker_group.spec.local_world_size,
            "GROUP_RANK": worker_group.group_rank,
            "GROUP_WORLD_SIZE": worker_group.group_world_size,
            "MASTER_ADDR": worker_group.master_addr,
            "MASTER_PORT": worker_group.master_port,
            "TORCHELASTIC_RUN_ID": worker_group.spec.rdzv_handler.get_run_id(),
            "TORCHELASTIC_USE_AGENT_STORE": worker_group.spec.rdzv_handler.use_agent_store,
            "TORCHELASTIC_RESTART_COUNT": 0,
            "TORCHELASTIC_MAX_RESTARTS": 0,
        }
        ranks = [worker.global_rank for worker in worker_group.workers]
        if ranks[0]:
            here = f"rank {ranks[0]} is" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]} are"
            log.info("%s here; rank 0 reports where it runs", here)
        # The folder of modules that a program was started from is not one for theirs, unless it is one for this.
        safe = [] if {"", os.getcwd()} & set(sys.path) else ["-P"]
        command = [sys.executable, *safe, "-m", self._module, str(self._folder)]
        for worker in worker_group.workers:
            own = {"RANK": worker.global_rank, "LOCAL_RANK": worker.local_rank}
            environment = {name: str(value) for name, value in (shared | own).items()}
            self._processes[worker.global_rank] = subprocess.Popen(
                command,
                env={**os.environ, **self._environment, **environment},
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
            self._signals.hand_on()
        if self._signals.first:  # it came while they were started
            for process in self._processes.values():
                process.send_signal(self._signals.first)
        return {worker.local_rank: self._processes[worker.global_rank].pid for worker in worker_group.workers}

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        codes = {rank: process.poll() for rank, process in self._processes.items()}
        if any(codes.values()):
            self._end()
            return RunResult(state=WorkerState.FAILED)
        if all(code == 0 for code in codes.values()):
            self._signals.keep()
            return RunResult(state=WorkerState.SUCCEEDED, return_values=dict.fromkeys(codes))
        return RunResult(state=WorkerState.HEALTHY)

    def _stop_workers(self, worker_group: WorkerGroup, *_: Any, **__: Any) -> None:
        self._end()

    def _shutdown(self, *_: Any, **__: Any) -> None:
        self._end()
        with suppress(RendezvousError, RuntimeError):
            self._worker_group.spec.rdzv_handler.shutdown()

    def _end(self) -> None:
        """Let what still runs end by itself within some seconds, then kill it with all that it has started."""
        running = {rank: process for rank, process in self._processes.items() if process.poll() is None}
        if not self._signals.first:
            for process in running.values():
                process.terminate()
        deadline = time.monotonic() + _SETTLE_SECONDS
        while time.monotonic() < deadline and any(process.poll() is None for process in running.values()):
            time.sleep(_POLL_SECONDS)
        for rank, process in running.items():
            if process.poll() is None:
                self._stopped.add(rank)
                _kill_group(process)
            elif process.returncode in (-signal.SIGTERM, 128 + signal.SIGTERM):
                self._stopped.add(rank)
            process.wait()


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
