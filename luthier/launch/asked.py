"""What the command line asks for in the way of processes, checked before anything is loaded."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from luthier.errors import ConfigError

LAUNCHERS = ("auto", "none", "ray")
_OF_OURS = ("num_processes", "nnodes", "node_rank", "rdzv_endpoint")
_OF_RAY = ("num_workers", "max_failures")
_LEAST = {"num_processes": 1, "nnodes": 1, "node_rank": 0, "num_workers": 1, "max_failures": 0}


@dataclass(frozen=True)
class Asked:
    """The options of the command line, as they were given; None: not given."""

    num_processes: int | None = None
    nnodes: int | None = None
    node_rank: int | None = None
    rdzv_endpoint: str | None = None
    launcher: str = "auto"
    num_workers: int | None = None
    max_failures: int | None = None

    @property
    def machines(self) -> int:
        return self.nnodes or 1

    @property
    def starts_processes(self) -> bool:
        """Whether processes are to be started here: not inside of a launcher, which has said so by WORLD_SIZE."""
        return self.launcher == "auto" and not os.environ.get("WORLD_SIZE")

    def check(self) -> None:
        """Raises ConfigError for values that are none, and for options that contradict each other or the
        environment."""
        if self.launcher not in LAUNCHERS:
            raise ConfigError(f"--launcher {self.launcher}: it is one of {', '.join(LAUNCHERS)}")
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"{_option(name)} {value}: it is at least {least}")
        of_ours, of_ray = self._given(*_OF_OURS), self._given(*_OF_RAY)
        if self.launcher != "ray" and of_ray:
            raise ConfigError(f"{of_ray}: this is for --launcher ray; say that too, or leave it out")
        if self.launcher == "ray" and of_ours:
            raise ConfigError(f"{of_ours}: --launcher ray starts its own workers; --num-workers says how many")
        if self.launcher == "none" and of_ours:
            raise ConfigError(f"{of_ours}: --launcher none starts nothing; leave one of them out")
        self._check_machines()
        self._check_environment(of_ours)

    def _check_machines(self) -> None:
        if self.machines == 1 and (alone := self._given("node_rank", "rdzv_endpoint")):
            raise ConfigError(f"{alone}: this is for several machines; say --nnodes N too, or leave it out")
        if self.machines > 1 and not self.rdzv_endpoint:
            raise ConfigError(
                f"--nnodes {self.nnodes}: say where the machines meet: --rdzv-endpoint HOST:PORT, the name of one of "
                "them and a free port there"
            )
        if self.node_rank is not None and self.node_rank >= self.machines:
            last = self.machines - 1
            raise ConfigError(f"--node-rank {self.node_rank}: of {self.nnodes} machines the last is {last}")
        if self.rdzv_endpoint is not None:
            host_and_port(self.rdzv_endpoint)

    def _check_environment(self, of_ours: str) -> None:
        size = os.environ.get("WORLD_SIZE")
        if size and (of_ours or self.launcher == "ray"):
            raise ConfigError(
                f"{of_ours or '--launcher ray'}: WORLD_SIZE is {size} in the environment, so that a launcher has "
                "started this process already. Leave the option out, or unset WORLD_SIZE"
            )
        tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "1")
        if not size and self.launcher != "ray" and self.machines == 1 and tasks not in ("", "1"):
            raise ConfigError(
                f"srun has started {tasks} tasks of this command, each of which would train by itself: either start "
                "one for each machine (srun --ntasks-per-node 1) with --nnodes and --rdzv-endpoint, or set "
                "RANK=$SLURM_PROCID, LOCAL_RANK=$SLURM_LOCALID, WORLD_SIZE=$SLURM_NTASKS, MASTER_ADDR and MASTER_PORT "
                "for each task"
            )

    def _given(self, *names: str) -> str:
        """Those of the options that were given, as a message names them."""
        return " and ".join(_option(name) for name in names if getattr(self, name) is not None)


def host_and_port(endpoint: str) -> tuple[str, int]:
    """The two parts of HOST:PORT; an IPv6 address is in brackets. Raises ConfigError for anything else."""
    found = re.fullmatch(r"(\[[0-9A-Fa-f:.%\w]+\]|[\w.-]+):(\d{1,5})", endpoint.strip())
    if found is None or not 0 < int(found[2]) < 65536:
        raise ConfigError(f"--rdzv-endpoint {endpoint}: write HOST:PORT, such as node0:29500")
    return found[1].strip("[]"), int(found[2])


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
