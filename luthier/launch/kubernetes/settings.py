"""What a job on Kubernetes is asked to be: the options of the command line, each checked before anything is written.

Kubernetes has its own rules for names, quantities and labels, and says what breaks them only when a cluster is asked,
some of it only when a pod starts. And a secret is never more than a name here: whatever looks like one itself is
refused, and not repeated in the message.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from luthier.errors import ConfigError
from luthier.export.scrub import Scrub

# The longest name that leaves room for what Kubernetes adds in a pod's host name, "-INDEX-xxxxx" of 63.
LONGEST_NAME = 50
VOLUME = "/luthier"
CONFIGS = "/config"
SCRIPT = "run.sh"  # in that folder
# What a pod has there already.
_OWN_FOLDERS = (VOLUME, CONFIGS, "/tmp", "/dev", "/proc", "/sys", "/etc", "/usr", "/bin", "/lib")

_LABEL = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_SUBDOMAIN = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
_QUALIFIED = re.compile(r"([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?[A-Za-z0-9]([\w.-]{0,61}[A-Za-z0-9])?", re.ASCII)
_LABEL_VALUE = re.compile(r"([A-Za-z0-9]([\w.-]{0,61}[A-Za-z0-9])?)?", re.ASCII)
_VARIABLE = re.compile(r"[A-Za-z_]\w*", re.ASCII)
_QUANTITY = re.compile(r"(\d+(?:\.\d+)?)(m|k|[MGTPE]|[KMGTPE]i)?")
_FACTORS = {"m": 1e-3, "k": 1e3} | {
    unit + ending: base**power
    for ending, base in (("", 1000.0), ("i", 1024.0))
    for power, unit in enumerate("KMGTPE", 1)
    if unit + ending != "K"
}
_DURATION = re.compile(r"(\d+)([smhd]?)")
_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}
_SECRET_VARIABLE = re.compile(r"(TOKEN|KEY|SECRET|PASSWORD)$", re.IGNORECASE)
# What run.sh is told by the job itself; a variable of the pod would hold against it.
_TOLD = {
    "CONFIG", "RUN", "NUM_PROCESSES", "BASE_MODEL", "MERGE", "PUSH", "NODES", "RDZV_ENDPOINT", "JOB_UID",
    "JOB_COMPLETION_INDEX", "WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT",
}  # fmt: skip
_OWN_LABELS = ("app.kubernetes.io/name", "app.kubernetes.io/instance")
_EFFECTS = ("NoSchedule", "PreferNoSchedule", "NoExecute")


@dataclass(frozen=True)
class Mount:
    """An existing claim for a volume, and where the pods see it."""

    claim: str
    path: str
    read_only: bool = False


@dataclass(frozen=True)
class Settings:
    """One job.

    Attributes:
        gpus: of one pod. nodes: pods. namespace: None: that of kubectl's context.
        storage, cpu, memory, shm: in Kubernetes' quantities; shm is counted as a part of memory.
        claim: an existing claim for output and hub cache, in place of a new one of `storage`.
        secrets: `NAME` (each of its keys is a variable) or `NAME:KEY` (this one).
        retries: starts after a failure, of the whole run. deadline, grace, ttl: seconds.
        user: id of user and group that the container runs as, and that the volume is for.
    """

    name: str
    image: str
    namespace: str | None = None
    gpus: int = 1
    nodes: int = 1
    gpu_resource: str = "nvidia.com/gpu"
    cpu: str = "4"
    memory: str = "32Gi"
    shm: str = "8Gi"
    storage: str = "100Gi"
    storage_class: str | None = None
    claim: str | None = None
    mounts: tuple[Mount, ...] = ()
    secrets: tuple[str, ...] = ()
    variables: dict[str, str] = field(default_factory=dict)
    labels: dict[str, str] = field(default_factory=dict)
    node_selector: dict[str, str] = field(default_factory=dict)
    tolerations: tuple[str, ...] = ()
    priority_class: str | None = None
    service_account: str | None = None
    pull_secrets: tuple[str, ...] = ()
    retries: int = 3
    deadline: int | None = None
    grace: int = 600
    ttl: int = 7 * 86400
    user: int = 1000

    def __post_init__(self) -> None:
        """Raises ConfigError for what Kubernetes would not take."""
        self._refuse_secrets()
        if not _LABEL.fullmatch(self.name) or len(self.name) > LONGEST_NAME:
            raise ConfigError(
                f"--name {self.name}: up to {LONGEST_NAME} small letters, digits and '-', beginning with a letter"
            )
        if not re.fullmatch(r"[^\s:@]\S*", self.image) or self.image.startswith("-") or "://" in self.image:
            raise ConfigError(f"--image {self.image!r}: the name of an image, such as registry.example/luthier:0.1")
        for option, number, least in (
            ("--gpus", self.gpus, 0),
            ("--nodes", self.nodes, 1),
            ("--retries", self.retries, 0),
            ("--user", self.user, 1),
        ):
            if number < least:
                why = ": Luthier does not run as root" if option == "--user" else ""
                raise ConfigError(f"{option} {number}: at least {least}{why}")
        self._check_names()
        self._check_quantities()
        for mount in self.mounts:
            if any(mount.path == own or mount.path.startswith(f"{own}/") for own in _OWN_FOLDERS):
                raise ConfigError(f"--mount {mount.claim}:{mount.path}: that is the pod's own; choose another path")
        if len({mount.path for mount in self.mounts}) < len(self.mounts):
            raise ConfigError("--mount: two volumes at one path")
        self._check_variables()
        for text in self.tolerations:
            toleration(text)

    def _refuse_secrets(self) -> None:
        """Before a message could repeat one."""
        texts = [("--name", self.name), ("--image", self.image), ("--claim", self.claim)]
        texts += [("--storage-class", self.storage_class), ("--gpu-resource", self.gpu_resource)]
        texts += [("--namespace", self.namespace), ("--priority-class", self.priority_class)]
        texts += [("--service-account", self.service_account)]
        texts += [("--secret", each) for each in self.secrets]
        texts += [("--pull-secret", each) for each in self.pull_secrets]
        texts += [("--toleration", each) for each in self.tolerations]
        texts += [("--mount", f"{mount.claim} {mount.path}") for mount in self.mounts]
        for name, value in self.variables.items():
            texts += [("--env", name), (f"--env {name}", value)]
        for option, pairs in (("--label", self.labels), ("--node-selector", self.node_selector)):
            texts += [(option, f"{key} {value}") for key, value in pairs.items()]
        for option, text in texts:
            if text is not None:
                refuse_secret(option, text)

    def _check_variables(self) -> None:
        single = [text.partition(":")[2] for text in self.secrets if ":" in text]
        given = [*(("--env", name) for name in self.variables), *(("--secret", name) for name in single)]
        for option, name in given:
            if option == "--env" and _SECRET_VARIABLE.search(name):
                raise ConfigError(f"--env {name}: its name is that of a secret. {_NAME_IT}")
            if name in _TOLD:
                raise ConfigError(f"{option} {name}: the job itself sets this variable; leave it out")
            if [other for _, other in given].count(name) > 1:
                raise ConfigError(f"{option} {name}: this variable is given twice")
        if len(set(self.secrets)) < len(self.secrets):
            raise ConfigError("--secret: one Secret is given twice")

    def _check_names(self) -> None:
        names = [("--storage-class", self.storage_class), ("--claim", self.claim)]
        names += [("--priority-class", self.priority_class), ("--service-account", self.service_account)]
        names += [("--pull-secret", name) for name in self.pull_secrets]
        names += [("--mount", mount.claim) for mount in self.mounts]
        for option, name in names:
            if name is not None and (len(name) > 253 or not _SUBDOMAIN.fullmatch(name)):
                raise ConfigError(
                    f"{option} {name}: up to 253 small letters, digits, '-' and '.', as Kubernetes names things"
                )
        if self.namespace is not None and not re.fullmatch(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?", self.namespace):
            raise ConfigError(f"--namespace {self.namespace}: up to 63 small letters, digits and '-'")
        if not _QUALIFIED.fullmatch(self.gpu_resource) or "/" not in self.gpu_resource:
            raise ConfigError(f"--gpu-resource {self.gpu_resource}: such as nvidia.com/gpu or nvidia.com/mig-1g.10gb")
        for text in self.secrets:
            name, colon, key = text.partition(":")
            # Not repeated, since whatever is no name here may be the secret itself.
            if not _SUBDOMAIN.fullmatch(name) or (colon and not _VARIABLE.fullmatch(key)):
                raise ConfigError(f"--secret: what was given is no name of a Secret (NAME or NAME:KEY). {_NAME_IT}")
        for option, pairs in (("--label", self.labels), ("--node-selector", self.node_selector)):
            for key, value in pairs.items():
                if option == "--label" and key in _OWN_LABELS:
                    raise ConfigError(f"--label {key}: the job itself has this label, by which it is found")
                if not _QUALIFIED.fullmatch(key) or not _LABEL_VALUE.fullmatch(value):
                    raise ConfigError(f"{option} {key}={value}: not a label that Kubernetes takes")

    def _check_quantities(self) -> None:
        sizes = {}
        for option, text in (
            ("--cpu", self.cpu), ("--memory", self.memory), ("--shm", self.shm), ("--storage", self.storage),
        ):  # fmt: skip
            sizes[option] = bytes_of(option, text)
            if option == "--cpu" and sizes[option] < 1e-3:
                raise ConfigError(f"--cpu {text}: at least 1m, a thousandth of a core")
            if option != "--cpu" and sizes[option] < 2**20:
                raise ConfigError(f"{option} {text}: that is {sizes[option]:g} bytes; write a unit, such as {text}Gi")
        if sizes["--shm"] >= sizes["--memory"]:
            raise ConfigError(
                f"--shm {self.shm} of --memory {self.memory}: shared memory is a part of the pod's memory; leave the "
                "processes some"
            )


_NAME_IT = (
    "Secrets are given by name only: make one with `kubectl create secret generic hub --from-env-file=FILE` "
    "(FILE has lines such as HF_TOKEN=...), then --secret hub"
)


def refuse_secret(where: str, text: str) -> None:
    """Raises ConfigError where a text holds a token or a key: it would be readable in the cluster."""
    scrub = Scrub()
    scrub.secret(text)
    if scrub.secrets:
        raise ConfigError(f"{where} holds what looks like a token or a key. {_NAME_IT}")


def bytes_of(option: str, text: str) -> float:
    """The number that a quantity such as `100Gi` stands for."""
    match = _QUANTITY.fullmatch(text)
    if match is None or float(match[1]) == 0:
        raise ConfigError(f"{option} {text}: a quantity as Kubernetes writes them, such as 4, 500m or 100Gi")
    return float(match[1]) * _FACTORS.get(match[2] or "", 1.0)


def seconds_of(option: str, text: str) -> int:
    """Seconds of `90`, `90s`, `30m`, `12h` or `7d`."""
    match = _DURATION.fullmatch(text)
    if match is None or int(match[1]) == 0:
        raise ConfigError(f"{option} {text}: a time such as 90s, 30m, 12h or 7d")
    return int(match[1]) * _SECONDS[match[2]]


def pairs_of(option: str, texts: Iterable[str]) -> dict[str, str]:
    """KEY=VALUE, each key once."""
    found: dict[str, str] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key or (option == "--env" and not _VARIABLE.fullmatch(key)):
            # The value is not repeated: it may be what nobody should see.
            raise ConfigError(f"{option} {key}: write KEY=VALUE" if key else f"{option}: write KEY=VALUE")
        if key in found:
            raise ConfigError(f"{option} {key} is given twice")
        found[key] = value
    return found


def mount_of(text: str) -> Mount:
    """`CLAIM:/path` or `CLAIM:/path:ro`."""
    claim, _, rest = text.partition(":")
    path, colon, mode = rest.partition(":")
    path = path.rstrip("/")
    leaves = {".", ".."} & set(path.split("/"))
    if not claim or not re.fullmatch(r"(/[\w.-]+)+", path) or leaves or (colon and mode != "ro"):
        refuse_secret("--mount", text)
        raise ConfigError(f"--mount {text}: write CLAIM:/path or CLAIM:/path:ro, by a PersistentVolumeClaim's name")
    return Mount(claim, path, mode == "ro")


def toleration(text: str) -> dict[str, Any]:
    """`KEY`, `KEY=VALUE`, each with `:EFFECT` behind it or not."""
    pair, colon, effect = text.partition(":")
    key, equals, value = pair.partition("=")
    if not _QUALIFIED.fullmatch(key) or not _LABEL_VALUE.fullmatch(value) or (colon and effect not in _EFFECTS):
        raise ConfigError(f"--toleration {text}: write KEY, KEY=VALUE or KEY:EFFECT, with one of {', '.join(_EFFECTS)}")
    found: dict[str, Any] = {"key": key, "operator": "Equal" if equals else "Exists"}
    if equals:
        found["value"] = value
    if colon:
        found["effect"] = effect
    return found


def name_from(text: str) -> str:
    """A name that Kubernetes takes, out of a file's."""
    slug = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    if not re.match("[a-z]", slug):
        slug = f"luthier-{slug}".rstrip("-")
    return slug[:LONGEST_NAME].rstrip("-")
