"""To the cluster: through kubectl, with whatever it is configured to reach.

Server-side, since the copy of a manifest that kubectl otherwise keeps in an annotation has to be below 256 kB, and a
ConfigMap with rows may not be.
"""

from __future__ import annotations

import logging
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from luthier.errors import ConfigError, RunError
from luthier.launch.kubernetes.settings import Settings

log = logging.getLogger("luthier")

_PATIENCE = "60s"  # for one request; a cluster that is asleep or far away answers within that
_LONGEST_SECONDS = 300.0  # for one command


class Kubectl:
    """kubectl, for one namespace of one cluster."""

    def __init__(self, namespace: str | None, context: str | None) -> None:
        """Raises RunError: there is no kubectl here."""
        found = shutil.which("kubectl")
        if found is None:
            raise RunError(
                "kubectl is not on this machine: install it, or add --dry-run --out FOLDER and go on where it is"
            )
        self._program = found
        self._arguments = _whereabouts(namespace, context)

    def refuse_a_second(self, name: str) -> None:
        """Raises ConfigError where a job of that name is there: its pods cannot be changed, so nothing would happen."""
        found = self._run(["get", "job", name, "--ignore-not-found", "-o", "name"])
        if found.strip():
            again = shlex.join(["kubectl", *self._arguments, "delete", "job", name])
            raise ConfigError(
                f"a job {name} is there already. Choose another --name; or, to go on with that run (its volume stays, "
                f"with the checkpoints): {again}, then the same command again"
            )

    def apply(self, files: Sequence[Path]) -> None:
        """Raises RunError with what the cluster says."""
        named = [argument for file in files for argument in ("-f", str(file))]
        for line in self._run(["apply", "--server-side", "--field-manager", "luthier", *named]).splitlines():
            log.info("%s", line)

    def _run(self, arguments: Sequence[str]) -> str:
        command = [self._program, f"--request-timeout={_PATIENCE}", *self._arguments, *arguments]
        try:
            done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=_LONGEST_SECONDS)
        except subprocess.TimeoutExpired as error:
            raise RunError(f"kubectl {arguments[0]}: no answer within {_LONGEST_SECONDS:g} seconds") from error
        if done.returncode:
            says = (done.stderr or done.stdout).strip() or f"exit status {done.returncode}"
            raise RunError(f"kubectl {arguments[0]}: {says}")
        return done.stdout


def _whereabouts(namespace: str | None, context: str | None) -> list[str]:
    return [*(["--context", context] if context else []), *(["-n", namespace] if namespace else [])]


def how_to_go_on(settings: Settings, context: str | None) -> str:
    """The commands with which a launched job is followed, resumed and deleted."""
    kubectl = shlex.join(["kubectl", *_whereabouts(settings.namespace, context)])
    name = settings.name
    follow = f"job/{name}"
    if settings.nodes > 1:
        follow = f"-l app.kubernetes.io/instance={name} --prefix --max-log-requests {settings.nodes}"
    lines = [
        ("follow", f"{kubectl} logs -f {follow}"),
        ("see", f"{kubectl} get job,pods -l app.kubernetes.io/instance={name}"),
        ("resume", f"{kubectl} delete job {name}, then the same command: it goes on from the last checkpoint"),
        ("delete", f"{kubectl} delete job,service,configmap -l app.kubernetes.io/instance={name}"),
    ]
    if settings.claim is None:
        lines.append(("and results", f"{kubectl} delete pvc {name}"))
    width = max(len(word) for word, _ in lines)
    return "\n".join(f"  {word:<{width}}  {text}" for word, text in lines)
