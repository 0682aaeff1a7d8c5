"""Several processes on one run: plain data parallelism inside of a launcher that is there already (torchrun).

Every process holds the whole model and computes its share of each step's documents (`data.loader`). After a step's
last pass gradients, loss and hits are added up over the processes, once, and then the optimizer takes the same step
everywhere: nothing else has to be kept equal. What has to be agreed on beside (who was told to stop, whose memory ran
out) goes over the CPU's network backend, so that no device is waited for.

Process 0 alone writes and reports; the others say only what is wrong, with their rank before it. A single process has
nothing to agree on, and all of this does nothing.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from itertools import count
from typing import Any, TypeVar

import torch

from luthier.config import Config
from luthier.config.processes import check_processes
from luthier.errors import ConfigError, ProcessLost, RunError

log = logging.getLogger("luthier")

# What a launcher sets; of `LOCAL_RANK` there is none where each process has a machine of its own.
_NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# Others wait while process 0 samples, saves, or evaluates the last of its documents, however long that takes: a
# process that dies closes its connections, which is noticed at once.
_PATIENCE = timedelta(days=1)
# Gradients are added up in pieces of this size: large enough for the network's full speed, small beside a model.
_BUCKET_BYTES = 2**26
_POLL_SECONDS = 0.1
# Runs of this process so far: what one has left in the launcher's store must not be read by the next.
_runs = count()

T = TypeVar("T")


class Processes:
    """The processes of a run, as one of them sees them.

    Attributes:
        rank: of this process, from 0. size: how many there are. local_rank: of this process on its machine.
    """

    def __init__(self, rank: int = 0, size: int = 1, local_rank: int = 0) -> None:
        self.rank, self.size, self.local_rank = rank, size, local_rank
        self._store: Any = None
        self._told: Any = None  # the group that words go through; gradients go through the default one

    @classmethod
    def of_environment(cls) -> Processes:
        """What the launcher has set; a single process where it has set nothing.

        Raises:
            ConfigError: some of it is missing or no number.
        """
        size = _number("WORLD_SIZE", 1)
        if size <= 1:
            return cls()
        if missing := [name for name in _NEEDED if not os.environ.get(name)]:
            raise ConfigError(
                f"WORLD_SIZE is {size}, but the environment lacks {', '.join(missing)}: a launcher (torchrun) sets "
                "them all; without one unset WORLD_SIZE: `luthier train cfg.yml --num-processes 2` starts processes"
            )
        rank = _number("RANK", 0)
        if not 0 <= rank < size:
            raise ConfigError(f"RANK is {rank} and WORLD_SIZE {size}: ranks go from 0 to {size - 1}")
        return cls(rank, size, _number("LOCAL_RANK", 0))

    @property
    def main(self) -> bool:
        """Whether this is the process that writes and reports."""
        return self.rank == 0

    def check(self, config: Config) -> None:
        """Raises ConfigError for what several processes cannot do."""
        check_processes(config, self.size)

    def take_device(self, device: torch.device) -> torch.device:
        """The device of this process among those of its kind.

        Raises:
            ConfigError: there are fewer devices than processes on this machine.
        """
        if self.size == 1 or device.type == "cpu":
            return device
        if device.type != "cuda":
            raise ConfigError(f"{device.type} computes in one process only: run one, or write device_map: cpu")
        if self.local_rank >= (there := torch.cuda.device_count()):
            raise ConfigError(
                f"LOCAL_RANK is {self.local_rank}, and this machine has {there} GPUs: start no more processes than "
                "there are GPUs (--num-processes)"
            )
        torch.cuda.set_device(self.local_rank)
        return torch.device("cuda", self.local_rank)

    # --- before the process group -------------------------------------------------------------------------------

    @contextmanager
    def connected(self) -> Iterator[None]:
        """While entered, processes reach each other; all but the first log what is wrong only."""
        if self.size == 1:
            yield
            return
        from torch import distributed

        try:
            store, _, _ = next(iter(distributed.rendezvous("env://")))
        except (RuntimeError, ValueError) as error:
            raise RunError(f"the processes of this run do not find each other: {_first_line(error)}") from error
        self._store = distributed.PrefixStore(f"luthier/{next(_runs)}", store)
        said = _Said(self.rank)
        log.addFilter(said)
        try:
            yield
            if self._told is not None:
                self.gather([])  # a launcher may take the first process's end for the end of all
                distributed.destroy_process_group()
            # After an error the connections stay until the process ends, which is after it has said what is wrong:
            # the others would end at once, and the launcher would end this one with them.
        finally:
            log.removeFilter(said)
            self._store = self._told = None

    def from_first(self, name: str, make: Callable[[], str]) -> str:
        """A text that process 0 makes and all others get, however long it takes."""
        if self.size == 1:
            return make()
        if self.main:
            made = make()
            self._store.set(name, made)
            return made
        self._wait_for(name)
        text: str = self._store.get(name).decode()
        return text

    def in_turn(self, prepare: Callable[[], T]) -> T:
        """Call a function that leaves something on the disk for the next: process 0 first, then the first process of
        every other machine, whose disk may be its own, then all others. Ends when all have called it."""
        if self.size == 1:
            return prepare()
        machine = f"prepared on {socket.gethostname()}"
        if not self.main:
            self._wait_for("prepared" if self.local_rank == 0 else machine)
        made = prepare()
        if self.main:
            self._store.set("prepared", "")
        if self.local_rank == 0:
            self._store.set(machine, "")
        self.say("prepared")
        self.hear("prepared", range(self.size))
        return made

    def say(self, what: str) -> None:
        """Let the others know that this process is so far, through the launcher's store: no collective, so that threads
        may use it beside training."""
        self._store.set(f"{what} by {self.rank}", "")

    def hear(self, what: str, ranks: Iterable[int]) -> None:
        """Wait until other processes are."""
        self._wait_for(*(f"{what} by {rank}" for rank in ranks))

    def _wait_for(self, *names: str) -> None:
        # Looked at again and again: waiting inside of the store has an end of its own, and hears no signal.
        try:
            while not self._store.check(list(names)):
                time.sleep(_POLL_SECONDS)
        except RuntimeError as error:
            raise self._broken(error) from error

    # --- with the process group ---------------------------------------------------------------------------------

    def join(self, device: torch.device, timeout: int | None = None) -> None:
        """Open the process group: NCCL between GPUs, Gloo between CPUs and for words.

        Args:
            timeout: seconds that a process waits for the others in a collective (None: torch's for NCCL).
        """
        if self.size == 1:
            return
        from torch import distributed

        cuda = device.type == "cuda"
        options: dict[str, Any] = {"device_id": device} if cuda else {"timeout": _PATIENCE}
        if timeout is not None:
            options["timeout"] = timedelta(seconds=timeout)
        with self._named_errors():
            distributed.init_process_group(
                "nccl" if cuda else "gloo",
                store=distributed.PrefixStore("group", self._store),
                rank=self.rank,
                world_size=self.size,
                **options,
            )
            # All processes have said their word before any of them hands the device something to add up, so that
            # NCCL's own time-out never sees a wait.
            self._told = (
                distributed.new_group(backend="gloo", timeout=_PATIENCE) if cuda else distributed.group.WORLD
            )

    def gather(self, values: Sequence[float]) -> list[list[float]]:
        """Numbers of each process, in order of ranks; as many from each. All wait for the last.

        Whole numbers are exact up to 2^53.
        """
        if self.size == 1:
            return [list(values)]
        from torch import distributed

        own = torch.tensor([0.0, *values], dtype=torch.float64)
        found = [torch.empty_like(own) for _ in range(self.size)]
        with self._named_errors():
            distributed.all_gather(found, own, group=self._told)
        return [each[1:].tolist() for each in found]

    def add_up(
        self,
        masters: Iterable[torch.Tensor],
        figures: Sequence[torch.Tensor],
        words: Sequence[float],
        *,
        failed: bool = False,
    ) -> list[list[float]]:
        """Sum the gradients of masters, and figures, over the processes, in place and in fp32.

        A master without a gradient on this process takes part with 0; one without on any stays without.

        Args:
            words: numbers that the processes tell each other on this occasion. failed: this one has no gradients to
                give; if any has none, nothing is added up.

        Returns:
            The words of each process, in order of ranks.
        """
        if self.size == 1:
            return [list(words)]
        masters = list(masters)
        missing = sum(master.grad is None for master in masters)
        said = self.gather([failed, missing, *words])
        if any(failed for failed, *_ in said):
            return [words for _, _, *words in said]
        if any(missing for _, missing, *_ in said):
            anywhere = map(any, zip(*self.gather([float(m.grad is not None) for m in masters]), strict=True))
            masters = [master for master, there in zip(masters, anywhere, strict=True) if there]
        for master in masters:
            if master.grad is None:
                master.grad = torch.zeros_like(master, dtype=torch.float32)
        self._sum([*(master.grad for master in masters if master.grad is not None), *figures])
        return [words for _, _, *words in said]

    def _sum(self, tensors: Sequence[torch.Tensor]) -> None:
        from torch import distributed

        for bucket in _buckets(tensors):
            flat = torch.cat([tensor.detach().reshape(-1).float() for tensor in bucket])
            with self._named_errors():
                distributed.all_reduce(flat)
            for tensor, total in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
                tensor.detach().copy_(total.view(tensor.shape))

    @torch.no_grad()
    def level(self, masters: Iterable[torch.Tensor], device: torch.device) -> None:
        """Give all processes the masters and the random state of process 0, to the bit."""
        if self.size == 1:
            return
        from torch import distributed

        with self._named_errors():
            for master in masters:
                same = master.detach().contiguous()
                distributed.broadcast(same.view(torch.uint8) if same.dim() else same, 0)
                master.copy_(same)
            state = torch.get_rng_state()
            distributed.broadcast(state, 0, group=self._told)
            torch.set_rng_state(state)
            if device.type == "cuda":
                state = torch.cuda.get_rng_state(device)
                distributed.broadcast(state, 0, group=self._told)
                torch.cuda.set_rng_state(state, device)

    def agree_on(self, what: str, digest: str) -> None:
        """Raises RunError on all processes unless they have the same digest (hexadecimal) of something."""
        found = [tuple(values) for values in self.gather([int(digest[i : i + 8], 16) for i in (0, 8)])]
        if others := [rank for rank, values in enumerate(found) if values != found[0]]:
            raise RunError(
                f"{what} are not the same on rank {others[0]} as on rank 0: all processes need the same files, the "
                "same versions of packages, and devices of one kind"
            )

    @contextmanager
    def lost_ones_named(self) -> Iterator[None]:
        """Inside, a process that is gone is told as elsewhere, where sums and gathers are another engine's."""
        try:
            yield
        except RuntimeError as error:
            if self.size > 1 and _is_of_a_group(error):
                raise self._broken(error) from error
            raise

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # of which torch.distributed's own are kinds
            raise self._broken(error) from error

    def _broken(self, error: Exception) -> ProcessLost:
        return ProcessLost(
            f"another of the {self.size} processes has ended or cannot be reached ({_first_line(error)}); its own "
            "message says why"
        )


def _is_of_a_group(error: RuntimeError) -> bool:
    """Gloo's errors have no class of their own."""
    from torch import distributed

    return isinstance(error, distributed.DistError) or any(word in str(error) for word in ("gloo/", "NCCL"))


class _Said(logging.Filter):
    """Of the first process everything; of another what is wrong, with its rank."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank

    def filter(self, record: logging.LogRecord) -> bool:
        if self.rank == 0:
            return True
        record.msg = f"rank {self.rank}: {record.msg}"
        return record.levelno >= logging.WARNING


def _buckets(tensors: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Neighbours that fit into `_BUCKET_BYTES` of fp32; a larger tensor by itself."""
    bucket: list[torch.Tensor] = []
    size = 0
    for tensor in tensors:
        if bucket and size + 4 * tensor.numel() > _BUCKET_BYTES:
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += 4 * tensor.numel()
    yield bucket


def _number(name: str, otherwise: int) -> int:
    text = os.environ.get(name) or str(otherwise)
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"{name} is {text!r} in the environment, and has to be a whole number") from None


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
