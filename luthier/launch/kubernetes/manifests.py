"""The manifests of a run: a ConfigMap with the config and the script, one with what the script is told, a claim for a
volume, the Job, and for several nodes a headless Service by which they find each other.

The Job starts its pod again after a failure, and the script goes on from the last checkpoint. What a new start cannot
mend (a config that is refused, an image without Luthier) ends it at once; a pod that had to make room (a drained node,
a preemption) does not count as a failure, and neither do those that trained with it and have stopped too. No pod starts
before the one that it replaces has ended, so that no two write into one run folder. Everything is plain data; fields
and meanings: the API reference of Kubernetes, from 1.29 on.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from importlib import resources
from typing import Any

import yaml

from luthier.launch.ended import STOPPED_ELSEWHERE
from luthier.launch.kubernetes.files import Parcel
from luthier.launch.kubernetes.settings import CONFIGS, SCRIPT, VOLUME, Settings, toleration

Manifest = dict[str, Any]

CONTAINER = "luthier"
RDZV_PORT = 29500
# What no new start can mend: a config or a command line that is refused (2), an image without bash or luthier.
_HOPELESS = (2, 126, 127)
JOB_LABEL = "app.kubernetes.io/instance"


def files_map(settings: Settings, parcel: Parcel) -> Manifest:
    """The YAML, what travels with it, and the script."""
    texts, rest = {SCRIPT: script()}, {}
    for key, content in parcel.files.items():
        try:
            texts[key] = content.decode()
        except UnicodeDecodeError:
            rest[key] = base64.b64encode(content).decode()
    found = _object("v1", "ConfigMap", settings, name=f"{settings.name}-files", data=texts)
    return found | {"binaryData": rest} if rest else found


def settings_map(settings: Settings, *, config: str, base_model: str, merge: bool, push: str | None) -> Manifest:
    """What the script is told: the variables that it explains."""
    told = {
        "CONFIG": config,
        "RUN": settings.name,
        "NUM_PROCESSES": str(max(settings.gpus, 1)),
        "BASE_MODEL": base_model,
        "MERGE": "true" if merge else "false",
        "PUSH": push or "",
    }
    if settings.nodes > 1:
        told["NODES"] = str(settings.nodes)
        told["RDZV_ENDPOINT"] = f"{settings.name}-0.{settings.name}:{RDZV_PORT}"
    return _object("v1", "ConfigMap", settings, name=f"{settings.name}-settings", data=told)


def claim(settings: Settings) -> Manifest:
    """The volume for runs, checkpoints and what is downloaded; several nodes write to it at once."""
    mode = "ReadWriteMany" if settings.nodes > 1 else "ReadWriteOnce"
    spec: Manifest = {"accessModes": [mode], "resources": {"requests": {"storage": settings.storage}}}
    if settings.storage_class is not None:
        spec["storageClassName"] = settings.storage_class
    return _object("v1", "PersistentVolumeClaim", settings, spec=spec)


def service(settings: Settings) -> Manifest:
    """No address of its own, but a name for each pod, also while the pods are not ready yet."""
    return _object(
        "v1",
        "Service",
        settings,
        spec={
            "clusterIP": "None",
            "publishNotReadyAddresses": True,
            "selector": {JOB_LABEL: settings.name},
            "ports": [{"name": "rendezvous", "port": RDZV_PORT}],
        },
    )


def job(settings: Settings, arguments: Sequence[str] = ()) -> Manifest:
    """The Job; `arguments` are overrides for the config."""
    spec: Manifest = {
        # A failure of one node ends all of them, and each counts.
        "backoffLimit": settings.retries * settings.nodes,
        "podReplacementPolicy": "Failed",
        "podFailurePolicy": {
            "rules": [
                {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
                {"action": "Ignore", "onExitCodes": _exits(STOPPED_ELSEWHERE)},
                {"action": "FailJob", "onExitCodes": _exits(*_HOPELESS)},
            ]
        },
        "ttlSecondsAfterFinished": settings.ttl,
        "template": {
            "metadata": {
                "labels": _labels(settings),
                # An autoscaler that wants the node for fewer pods waits.
                "annotations": {"cluster-autoscaler.kubernetes.io/safe-to-evict": "false"},
            },
            "spec": _pod(settings, arguments),
        },
    }
    if settings.deadline is not None:
        spec["activeDeadlineSeconds"] = settings.deadline
    if settings.nodes > 1:
        spec |= {"completionMode": "Indexed", "completions": settings.nodes, "parallelism": settings.nodes}
    return _object("batch/v1", "Job", settings, spec=spec)


def _exits(*values: int) -> Manifest:
    return {"containerName": CONTAINER, "operator": "In", "values": list(values)}


def _pod(settings: Settings, arguments: Sequence[str]) -> Manifest:
    tolerations = [toleration(text) for text in settings.tolerations]
    if settings.gpus and not any(each["key"] == settings.gpu_resource for each in tolerations):
        # What keeps pods without a need for GPUs off the nodes that have them.
        tolerations.append({"key": settings.gpu_resource, "operator": "Exists", "effect": "NoSchedule"})
    spec: Manifest = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": settings.grace,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": settings.user,
            "runAsGroup": settings.user,
            "fsGroup": settings.user,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [_container(settings, arguments)],
        "volumes": _volumes(settings),
    }
    further = {
        "nodeSelector": settings.node_selector,
        "tolerations": tolerations,
        "priorityClassName": settings.priority_class,
        "serviceAccountName": settings.service_account,
        "imagePullSecrets": [{"name": name} for name in settings.pull_secrets],
        "subdomain": settings.name if settings.nodes > 1 else None,
    }
    return spec | {key: value for key, value in further.items() if value}


def _container(settings: Settings, arguments: Sequence[str]) -> Manifest:
    amounts: Manifest = {"cpu": settings.cpu, "memory": settings.memory}
    if settings.gpus:
        amounts[settings.gpu_resource] = str(settings.gpus)
    variables = {
        "HOME": "/tmp",
        "USER": "luthier",  # a number alone has no name that libraries could ask the system for
        "HF_HOME": f"{VOLUME}/hub",
        "LUTHIER_CACHE": f"{VOLUME}/datasets",
        **settings.variables,
    }
    whole = [name for name in settings.secrets if ":" not in name]
    single = [text.partition(":")[::2] for text in settings.secrets if ":" in text]
    found: Manifest = {
        "name": CONTAINER,
        "image": settings.image,
        "command": ["/bin/bash", f"{CONFIGS}/{SCRIPT}"],
        "workingDir": VOLUME,
        "env": [
            *({"name": name, "value": _literal(value)} for name, value in variables.items()),
            {
                "name": "JOB_UID",
                "valueFrom": {"fieldRef": {"fieldPath": "metadata.labels['batch.kubernetes.io/controller-uid']"}},
            },
            *({"name": key, "valueFrom": {"secretKeyRef": {"name": name, "key": key}}} for name, key in single),
        ],
        "envFrom": [
            *({"secretRef": {"name": name}} for name in whole),
            # Last, since of two variables of one name the later holds.
            {"configMapRef": {"name": f"{settings.name}-settings"}},
        ],
        "resources": {"requests": dict(amounts), "limits": dict(amounts)},
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
        "volumeMounts": [
            {"name": "files", "mountPath": CONFIGS, "readOnly": True},
            {"name": "luthier", "mountPath": VOLUME},
            {"name": "shm", "mountPath": "/dev/shm"},
            {"name": "tmp", "mountPath": "/tmp"},
            *(
                {"name": f"mount-{at}", "mountPath": mount.path} | ({"readOnly": True} if mount.read_only else {})
                for at, mount in enumerate(settings.mounts)
            ),
        ],
    }
    if arguments:
        found["args"] = [_literal(argument) for argument in arguments]
    return found


def _volumes(settings: Settings) -> list[Manifest]:
    return [
        {"name": "files", "configMap": {"name": f"{settings.name}-files"}},
        {"name": "luthier", "persistentVolumeClaim": {"claimName": settings.claim or settings.name}},
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": settings.shm}},
        {"name": "tmp", "emptyDir": {}},
        *(
            {"name": f"mount-{at}", "persistentVolumeClaim": {"claimName": mount.claim}}
            for at, mount in enumerate(settings.mounts)
        ),
    ]


def _object(api: str, kind: str, settings: Settings, *, name: str | None = None, **rest: Any) -> Manifest:
    metadata: Manifest = {"name": name or settings.name, "labels": _labels(settings)}
    if settings.namespace is not None:
        metadata["namespace"] = settings.namespace
    return {"apiVersion": api, "kind": kind, "metadata": metadata, **rest}


def _labels(settings: Settings) -> dict[str, str]:
    return {**settings.labels, "app.kubernetes.io/name": "luthier", JOB_LABEL: settings.name}


def _literal(text: str) -> str:
    """Kubernetes puts a variable's value in the place of $(NAME), and one $ in that of $$."""
    return text.replace("$", "$$")


def script() -> str:
    """What the container runs."""
    return (resources.files("luthier.launch.kubernetes") / SCRIPT).read_text(encoding="utf-8")


class _Dumper(yaml.SafeDumper):
    """Texts of several lines as such, everything else as short as it goes, and no anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.Node:
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)


_Dumper.add_representer(str, _text)


def to_yaml(manifests: Sequence[Manifest]) -> str:
    """YAML documents, in this order."""
    return yaml.dump_all(manifests, Dumper=_Dumper, sort_keys=False, explicit_start=True, allow_unicode=True, width=120)
