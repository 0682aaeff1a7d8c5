"""Checkpoints: complete, atomic, and keyed by parameter name.

A checkpoint is a folder `checkpoint-N`. It is written under another name, flushed to the disk and renamed, so
that a run killed at any moment leaves either a whole checkpoint or none; every file's size and checksum are in
`trainer_state.json`, so that one that was damaged later is recognised and passed over.

    checkpoint-N/
      masters.safetensors     the trained parameters in fp32 (in bfloat16 if they are trained in it), as evaluated
      optimizer.safetensors   the optimizer's tensors, `<field>/<parameter name>`; these two may be several files each
      rng.pt                  random states of torch
      trainer_state.json      where the run stands, and the checksums
      ...                     the adapter or model itself, in its own format, ready to be loaded elsewhere
"""

from __future__ import annotations

import io
import json
import logging
import os
import re
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file, save_file

from luthier.errors import RunError

log = logging.getLogger("luthier")

_NAME = re.compile(r"checkpoint-(\d+)")
_PARTIAL = ".partial-"
STATE = "trainer_state.json"
# Before the name of what an optimizer keeps for a group of parameters; it is written for each of them.
_OF_GROUP = "group."


@dataclass
class Window:
    """Sums since the last logged row; `sums` are the objective's own."""

    steps: int = 0
    loss: float = 0.0
    sums: list[float] = field(default_factory=list)
    trained_tokens: int = 0
    tokens: int = 0
    seconds: float = 0.0


@dataclass
class State:
    """Where a run stands; everything that its next step depends on beside tensors.

    Attributes:
        step: optimizer steps done. documents: examples consumed by the whole job, over all epochs.
        tokens: of the examples. computed_tokens: fewer, where examples of a pass share what they begin with.
        seconds: spent in training steps, over all starts of the run.
        window: since the last logged row. between: since the last evaluation.
        evaluations: (step, eval loss, mean train loss since the evaluation before it), in order.
        tokens_per_pass: most tokens in a forward pass. tokens_asked: what the config said of it then.
        recomputed: how each layer recomputes (`models.recompute`), where memory chose it.
        noticed: what a watch of the figures knows (`train.preference_watch`).
        stream: where the rows come from next, if they are streamed (`data.stream`).
    """

    step: int = 0
    documents: int = 0
    tokens: int = 0
    computed_tokens: int = 0
    trained_tokens: int = 0
    seconds: float = 0.0
    window: Window = field(default_factory=Window)
    between: Window = field(default_factory=Window)
    evaluations: list[list[Any]] = field(default_factory=list)
    best_loss: float | None = None
    best_step: int | None = None
    evaluations_since_best: int = 0
    loss_scale: dict[str, Any] = field(default_factory=dict)
    tokens_per_pass: int = 0
    tokens_asked: int | str | None = None
    recomputed: list[str] = field(default_factory=list)
    noticed: dict[str, Any] = field(default_factory=dict)
    stream: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, values: dict[str, Any]) -> State:
        known = {f.name: values[f.name] for f in fields(cls) if f.name in values}
        return cls(**{**known, "window": Window(**values["window"]), "between": Window(**values["between"])})


@dataclass(frozen=True)
class Collected:
    """What a checkpoint holds beside the state: whole tensors, by parameter name.

    Attributes:
        masters: the trained parameters. optimizer, values: as `optimizer_by_name` gives them.
        weights: of the whole model, on the host, where no process holds it (`train.fsdp`).
    """

    masters: dict[str, torch.Tensor]
    optimizer: dict[str, torch.Tensor]
    values: dict[str, Any]
    weights: dict[str, torch.Tensor] | None = None


class Writers(Protocol):
    """The processes that write a checkpoint together; see `train.distributed.Processes`."""

    rank: int
    size: int

    def say(self, what: str) -> None:
        """Let the others know that this process is so far."""

    def hear(self, what: str, ranks: Iterable[int]) -> None:
        """Wait until others are."""


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: the run folder.
        write_model: writes the adapter or model, in its own format, into the folder that it is given; of a model that
            no process holds it is given the weights too.
        limit: how many to keep (the best one is kept beside them); None keeps all.
        job: what must be the same for a run to go on (a fingerprint of data and model); kept in each checkpoint.
        writes: false in a process that leaves it to another. on_saved: told of every folder that is written.
        background: files are written while training goes on, from copies in the host's memory; `settle` waits for it.
        writers: where every process writes a share of the tensors; all see the same folder then.
    """

    def __init__(
        self,
        folder: Path,
        write_model: Callable[[Path, dict[str, torch.Tensor] | None], None],
        *,
        limit: int | None,
        job: dict[str, Any],
        writes: bool = True,
        on_saved: Callable[[Path], None] = lambda path: None,
        background: bool = False,
        writers: Writers | None = None,
    ) -> None:
        self.folder = folder
        self.write_model = write_model
        self.limit = limit
        self.job = job
        self.writes = writes
        self.on_saved = on_saved
        self._written: Path | None = None
        self.writers = writers
        self._writer = ThreadPoolExecutor(1, "checkpoint") if background and (writes or writers) else None
        self._writing: Future[None] | None = None

    def save(self, state: State, collect: Callable[[], Collected | None]) -> Path:
        """Write `checkpoint-<state.step>`; a second call after the same step changes nothing.

        A folder of that name that is there from before (damaged and passed over) is replaced.

        Args:
            collect: gives what is to be written, and None in a process that does not write; called in all of them.

        Raises:
            RunError: it cannot be written, or the one before could not be; nothing half-written stays behind.
        """
        final = self.folder / f"checkpoint-{state.step}"
        if final == self._written:
            return final
        self._written = final
        self.settle()
        collected = collect()
        if collected is None:
            return final
        # Through memory: on a full disk torch.save says nothing that a user could understand.
        random = io.BytesIO()
        torch.save(_random_state(), random)
        if self.writes:
            with self._partial(final) as partial:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
                if collected.weights is None:  # out of the model itself, which training is about to change
                    self.write_model(partial, None)
        rest = (final, asdict(state), random.getvalue())
        if self._writer is None:
            self._complete(*rest, collected)
        else:
            masters, optimizer = ({n: _copy(t) for n, t in d.items()} for d in (collected.masters, collected.optimizer))
            copied = replace(collected, masters=masters, optimizer=optimizer)
            self._writing = self._writer.submit(self._complete, *rest, copied)
        return final

    def settle(self) -> None:
        """Wait until what is being written is there.

        Raises:
            RunError: it cannot be written.
        """
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def _complete(self, final: Path, state: dict[str, Any], random: bytes, collected: Collected) -> None:
        """Everything beside the model into a checkpoint that has been begun, and its name."""
        with self._partial(final) as partial:
            if self.writers is not None:
                self.writers.say(f"{final.name} begun")
                self.writers.hear(f"{final.name} begun", [0])
            which = "" if self.writers is None else f"-{self.writers.rank + 1:05d}-of-{self.writers.size:05d}"
            save_file({n: _host(t) for n, t in collected.masters.items()}, partial / f"masters{which}.safetensors")
            save_file({n: _host(t) for n, t in collected.optimizer.items()}, partial / f"optimizer{which}.safetensors")
            if self.writers is not None:
                self.writers.say(f"{final.name} written")
                if not self.writes:
                    return
                self.writers.hear(f"{final.name} written", range(self.writers.size))
            if collected.weights is not None:
                self.write_model(partial, collected.weights)
            (partial / "rng.pt").write_bytes(random)
            files = {
                p.relative_to(partial).as_posix(): _checksum(p)
                for p in sorted(partial.rglob("*"))
                if p.is_file()
            }
            written = {**state, "job": self.job, "optimizer_values": collected.values, "files": files}
            (partial / STATE).write_text(json.dumps(written, indent=1), encoding="utf-8")
            share(partial)
            for path in partial.rglob("*"):
                _flush(path)
            if final.exists():
                _remove(final)
            partial.rename(final)
            _flush(self.folder)
        self._prune(state["best_step"])
        self.on_saved(final)

    @contextmanager
    def _partial(self, final: Path) -> Iterator[Path]:
        partial = self.folder / f"{_PARTIAL}{final.name}"
        try:
            yield partial
        except Exception as error:
            shutil.rmtree(partial, ignore_errors=True)
            if (
                not isinstance(error, OSError)
                and "No space left" not in str(error)
                and "I/O error" not in str(error)
            ):
                raise
            last = latest(self.folder)
            raise RunError(
                f"{final}: cannot be written: {error}; "
                + (f"the last good checkpoint is {last.name}" if last else "there is no earlier checkpoint")
            ) from error

    def _prune(self, best_step: int | None) -> None:
        if self.limit is None:
            return
        best = f"checkpoint-{best_step}"
        others = [path for path in list_checkpoints(self.folder) if path.name != best]
        for path in others[: -self.limit]:
            _remove(path)


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders of a run, oldest first."""
    found = [p for p in folder.glob("checkpoint-*") if step_of(p) >= 0 and p.is_dir()]
    return sorted(found, key=step_of)


def step_of(path: Path) -> int:
    """The step in the name of a checkpoint folder; -1 if it is no such name."""
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match else -1


def latest(folder: Path) -> Path | None:
    """The newest checkpoint that is whole; damaged ones are named and passed over."""
    for path in reversed(list_checkpoints(folder)):
        problem = damage(path)
        if not problem:
            return path
        log.warning("%s is passed over: %s", path.name, problem)
    return None


def damage(path: Path) -> str:
    """What is wrong with a checkpoint; empty if nothing is."""
    try:
        files = json.loads((path / STATE).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError):
        return f"{STATE} is missing or unreadable"
    for name, expected in files.items():
        try:
            if _checksum(path / name) != expected:
                return f"{name} is not what was written"
        except OSError:
            return f"{name} is missing"
    return ""


def read_state(path: Path) -> tuple[State, dict[str, Any]]:
    """The state in a checkpoint, and the job that it belongs to."""
    values = json.loads((path / STATE).read_text(encoding="utf-8"))
    return State.of(values), values["job"]


def read_masters(path: Path) -> dict[str, torch.Tensor]:
    return read_tensors(path, "masters")


def read_tensors(path: Path, what: str) -> dict[str, torch.Tensor]:
    """`masters` or `optimizer` of a checkpoint, by whomever it was written. The files are mapped: what is not used of
    a tensor is not read."""
    found: dict[str, torch.Tensor] = {}
    for file in sorted(path.glob(f"{what}*.safetensors")):
        found |= load_file(file)
    return found


def restore_optimizer(
    path: Path,
    masters: dict[str, torch.Tensor],
    optimizer: torch.optim.Optimizer,
    part: Callable[[str, torch.Tensor], torch.Tensor] = lambda name, tensor: tensor,
) -> None:
    """Put the optimizer's tensors back, each to the parameter of its name, and torch's random states.

    Args:
        part: what this process keeps of a tensor that belongs to a parameter.
    """
    values = json.loads((path / STATE).read_text(encoding="utf-8"))["optimizer_values"]
    by_parameter: dict[str, dict[str, Any]] = {name: {} for name in masters}
    for key, tensor in read_tensors(path, "optimizer").items():
        field_name, _, name = key.partition("/")
        by_parameter[name][field_name] = part(name, tensor)
    of_group: dict[str, dict[str, Any]] = {name: {} for name in masters}
    for key, value in values.items():
        field_name, _, name = key.partition("/")
        if field_name.startswith(_OF_GROUP):
            of_group[name][field_name.removeprefix(_OF_GROUP)] = value
        else:
            by_parameter[name][field_name] = value
    # torch numbers parameters in group order and moves the state to each parameter's device and dtype
    names = {id(master): name for name, master in masters.items()}
    packed = optimizer.state_dict()
    for saved, group in zip(packed["param_groups"], optimizer.param_groups, strict=True):
        saved |= of_group[names[id(group["params"][0])]]
    ordered = [p for group in optimizer.param_groups for p in group["params"]]
    packed["state"] = {
        i: by_parameter[names[id(p)]] for i, p in enumerate(ordered) if by_parameter[names[id(p)]]
    }
    optimizer.load_state_dict(packed)
    restore_random_state(path)


def restore_random_state(path: Path) -> None:
    """Put torch's random states back."""
    random = torch.load(path / "rng.pt", weights_only=True)
    torch.set_rng_state(random["cpu"])
    if torch.cuda.is_available() and random.get("cuda") is not None:
        torch.cuda.set_rng_state(random["cuda"])


def optimizer_by_name(
    masters: dict[str, torch.Tensor], optimizer: torch.optim.Optimizer
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The optimizer's state as `<field>/<parameter name>`: tensors, and values that are none."""
    names = {id(master): name for name, master in masters.items()}
    tensors: dict[str, torch.Tensor] = {}
    others: dict[str, Any] = {}
    seen: set[int] = set()
    for parameter, state in optimizer.state.items():
        for field_name, value in state.items():
            key = f"{field_name}/{names[id(parameter)]}"
            if isinstance(value, torch.Tensor):
                # bitsandbytes' parameters share the table of what 8 bits stand for; a file's tensors share nothing
                place = value.untyped_storage().data_ptr()
                tensors[key] = value.clone() if place and place in seen else value
                seen.add(place)
            else:
                others[key] = value
    for group in optimizer.param_groups:
        for field_name in _group_state(optimizer):
            if field_name in group:
                value = group[field_name]
                others |= {f"{_OF_GROUP}{field_name}/{names[id(p)]}": value for p in group["params"]}
    return tensors, others


def _group_state(optimizer: torch.optim.Optimizer) -> tuple[str, ...]:
    """What an optimizer keeps in its groups beside settings, such as a count of steps; torch's own have none."""
    return getattr(optimizer, "group_state", ())


def share(folder: Path) -> None:
    """Give the files of a folder the permissions that the user's umask gives new files."""
    umask = os.umask(0)
    os.umask(umask)
    for path in folder.iterdir():
        if path.is_file():
            path.chmod(0o666 & ~umask)


def _remove(path: Path) -> None:
    # Renamed first: a removal cut short must not leave something that looks like a checkpoint.
    doomed = path.with_name(f"{_PARTIAL}old-{path.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    path.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _random_state() -> dict[str, torch.Tensor | None]:
    return {
        "cpu": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def _host(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu").contiguous()


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    """On the host, in memory that nobody else writes to."""
    return tensor.detach().to("cpu", copy=True).contiguous()


def _checksum(path: Path) -> list[int]:
    crc = 0
    with path.open("rb") as file:
        while block := file.read(2**22):
            crc = zlib.crc32(block, crc)
    return [path.stat().st_size, crc]


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
