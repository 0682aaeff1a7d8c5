"""`luthier launch kubernetes`: from a config and options to manifests, and to the cluster."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Annotated, Any

import typer

from luthier.config import Config
from luthier.config.arguments import ConfigArgument, OverridesArgument
from luthier.config.artifact_names import named_in
from luthier.config.convert.command import config_of
from luthier.config.processes import check_processes
from luthier.errors import ConfigError
from luthier.launch.kubernetes import manifests
from luthier.launch.kubernetes.apply import Kubectl, how_to_go_on
from luthier.launch.kubernetes.files import Parcel, pack, refuse_secrets
from luthier.launch.kubernetes.settings import (
    VOLUME,
    Settings,
    mount_of,
    name_from,
    pairs_of,
    refuse_secret,
    seconds_of,
)

log = logging.getLogger("luthier")

Texts = list[str] | None


def command(
    where: Annotated[str, typer.Argument(metavar="kubernetes", help="Where to.", show_default=False)],
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    image: Annotated[str, typer.Option(help="Image with Luthier in it; the Dockerfile makes one.")] = "",
    gpus: Annotated[int, typer.Option(help="GPUs of each node, one process for each; 0 trains on the CPU.")] = 1,
    nodes: Annotated[int, typer.Option(help="Pods that train together, each with that many GPUs.")] = 1,
    namespace: Annotated[str | None, typer.Option(help="Namespace. Default: that of kubectl's context.")] = None,
    name: Annotated[str | None, typer.Option(help="Of the job and its run. Default: from the config's file.")] = None,
    cpu: Annotated[str | None, typer.Option(help="CPU cores of a node. Default: 4 for each GPU.")] = None,
    memory: Annotated[str | None, typer.Option(help="Memory of a node. Default: 32Gi for each GPU.")] = None,
    shm: Annotated[str, typer.Option(help="Shared memory of a node's processes, a part of its memory.")] = "8Gi",
    storage: Annotated[str, typer.Option(help="Size of the volume for runs and what is downloaded.")] = "100Gi",
    storage_class: Annotated[str | None, typer.Option(help="Its class. Default: the cluster's.")] = None,
    claim: Annotated[
        str | None, typer.Option(metavar="NAME", help="An existing PersistentVolumeClaim in place of a new volume.")
    ] = None,
    mount: Annotated[
        Texts, typer.Option(metavar="CLAIM:/PATH[:ro]", help="A further volume, with data or models; may be repeated.")
    ] = None,
    merge: Annotated[
        bool | None, typer.Option("--merge/--no-merge", help="Merge the adapter afterwards. Default: if there is one.")
    ] = None,
    push: Annotated[
        str | None, typer.Option(metavar="OWNER/NAME", help="Push the merged model (else the adapter) to the hub.")
    ] = None,
    secret: Annotated[
        Texts,
        typer.Option(
            metavar="NAME[:KEY]", help="A Secret of the cluster, by name: its keys are variables; may be repeated."
        ),
    ] = None,
    env: Annotated[
        Texts, typer.Option(metavar="NAME=VALUE", help="A variable that is no secret; may be repeated.")
    ] = None,
    retries: Annotated[int, typer.Option(help="Starts after a failure, each from the last checkpoint.")] = 3,
    deadline: Annotated[
        str | None, typer.Option(metavar="12h", help="Time after which the job is ended. Default: none.")
    ] = None,
    grace: Annotated[
        str, typer.Option(metavar="10m", help="Time that a pod which has to go gets to finish a step and save.")
    ] = "10m",
    ttl: Annotated[str, typer.Option(metavar="7d", help="Time for which a job that has ended is kept.")] = "7d",
    node_selector: Annotated[Texts, typer.Option(metavar="LABEL=VALUE", help="Of the nodes; may be repeated.")] = None,
    toleration: Annotated[
        Texts,
        typer.Option(
            metavar="KEY[=VALUE][:EFFECT]", help="Beside that of the GPUs, which is always there; may be repeated."
        ),
    ] = None,
    label: Annotated[
        Texts, typer.Option(metavar="KEY=VALUE", help="For all objects, such as a queue's; may be repeated.")
    ] = None,
    priority_class: Annotated[str | None, typer.Option(metavar="NAME", help="Of the pods.")] = None,
    service_account: Annotated[str | None, typer.Option(metavar="NAME", help="Of the pods.")] = None,
    pull_secret: Annotated[
        Texts, typer.Option(metavar="NAME", help="Of the image's registry, by name; may be repeated.")
    ] = None,
    gpu_resource: Annotated[str, typer.Option(help="What a GPU is called in the cluster.")] = "nvidia.com/gpu",
    user: Annotated[int, typer.Option(help="Number of the user and the group that it runs as.")] = 1000,
    context: Annotated[str | None, typer.Option(help="Context of kubectl.")] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Where the manifests are written. Default: kubernetes/NAME.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Ask no cluster: print the manifests, or write them to --out.")
    ] = False,
) -> None:
    """Run a config as a Kubernetes Job: train, merge the adapter, push."""
    if where != "kubernetes":
        raise ConfigError(f"{where}: there is luthier launch kubernetes CONFIG, and nothing else to launch on")
    refuse_secrets(config, overrides or [])
    loaded = config_of(config, overrides or [])
    if not image:
        raise ConfigError("--image is missing: the image that the pods run; docs/kubernetes.md says how it is built")
    settings = Settings(
        name=name if name is not None else name_from(config.stem),
        image=image,
        namespace=namespace,
        gpus=gpus,
        nodes=nodes,
        gpu_resource=gpu_resource,
        cpu=cpu or str(4 * max(gpus, 1)),
        memory=memory or f"{32 * max(gpus, 1)}Gi",
        shm=shm,
        storage=storage,
        storage_class=storage_class,
        claim=claim,
        mounts=tuple(mount_of(text) for text in mount or []),
        secrets=tuple(secret or []),
        variables=pairs_of("--env", env or []),
        labels=pairs_of("--label", label or []),
        node_selector=pairs_of("--node-selector", node_selector or []),
        tolerations=tuple(toleration or []),
        priority_class=priority_class,
        service_account=service_account,
        pull_secrets=tuple(pull_secret or []),
        retries=retries,
        deadline=seconds_of("--deadline", deadline) if deadline else None,
        grace=seconds_of("--grace", grace),
        ttl=seconds_of("--ttl", ttl),
        user=user,
    )
    check_processes(loaded, max(gpus, 1) * nodes)
    merges = loaded.adapter.adapter is not None if merge is None else merge
    _check_steps(loaded, settings, merges, push)
    parcel = pack(config, overrides or [], loaded, settings)
    config_of(config, [*(overrides or []), *parcel.overrides], quiet=True)  # as it will be read in the pod

    parts = _manifests(settings, parcel, loaded, merges, push)
    _say(settings, merges, push, loaded)
    if dry_run:
        if out is None:
            print(manifests.to_yaml([each for part in parts.values() for each in part]), end="")
        files = _write(out, parts) if out is not None else ["-"]
        apply = " ".join(f"-f {each}" for each in files)
        log.info("nothing was applied (--dry-run); kubectl apply --server-side %s does it. From then on", apply)
    else:
        kubectl = Kubectl(namespace, context)
        kubectl.refuse_a_second(settings.name)
        kubectl.apply(_write(out or Path("kubernetes") / settings.name, parts))
    log.info("%s", how_to_go_on(settings, context))


def _check_steps(config: Config, settings: Settings, merges: bool, push: str | None) -> None:
    """Whether what comes after the training can be done."""
    if merges and config.adapter.adapter is None:
        raise ConfigError("--merge: the config trains no adapter, so there is nothing to merge; leave --merge out")
    if push is not None:
        refuse_secret("--push", push)
        if not re.fullmatch(r"[\w][\w.-]*/[\w][\w.-]*", push, re.ASCII):
            raise ConfigError(f"--push {push}: the repository's name is owner/name")
        if not _may_hold(settings, "HF_TOKEN"):
            raise ConfigError(
                "--push needs a token with write access in HF_TOKEN: add --secret NAME, or --secret NAME:HF_TOKEN"
            )
    if config.distributed.deepspeed:
        log.info("deepspeed: the image has to have DeepSpeed in it; docs/kubernetes.md says how it gets there")
    reports = config.logging.report_to
    online = "wandb" in ([reports] if isinstance(reports, str) else reports) or config.logging.wandb_project
    sends = bool(online) and config.logging.wandb_mode in (None, "online")
    if (sends or any(named_in(config.flat()))) and not _may_hold(settings, "WANDB_API_KEY"):
        log.warning("wandb wants WANDB_API_KEY: --secret NAME, or wandb_mode: offline")


def _may_hold(settings: Settings, key: str) -> bool:
    """Whether one of the secrets is this key, or a whole one, whose keys are not known here."""
    return any(":" not in text or text.endswith(f":{key}") for text in settings.secrets)


def _manifests(
    settings: Settings, parcel: Parcel, config: Config, merges: bool, push: str | None
) -> dict[str, list[dict[str, Any]]]:
    """By file: what stays when a job is deleted, and the job."""
    told = manifests.settings_map(
        settings, config=parcel.config_name, base_model=config.model.base_model, merge=merges, push=push
    )
    storage = [] if settings.claim else [manifests.claim(settings)]
    net = [manifests.service(settings)] if settings.nodes > 1 else []
    work = [manifests.files_map(settings, parcel), told, *net, manifests.job(settings, parcel.overrides)]
    return {"storage.yaml": storage, "job.yaml": work}


def _write(folder: Path, parts: dict[str, list[dict[str, Any]]]) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for file, content in parts.items():
        path = folder / file
        if content:
            path.write_text(manifests.to_yaml(content), encoding="utf-8")
            log.info("written: %s", path)
            written.append(path)
        elif path.exists():
            path.unlink()
            log.info("removed: %s, of an earlier launch", path)
    return written


def _say(settings: Settings, merges: bool, push: str | None, config: Config) -> None:
    """What will be made, before it is."""
    gpus = f"{settings.gpus} {settings.gpu_resource}" if settings.gpus else "no GPU"
    pods = f"{settings.nodes} pods of" if settings.nodes > 1 else "a pod of"
    steps = ["train", *(["merge-lora"] if merges else []), *([f"push to {push}"] if push else [])]
    log.info(
        "job %s%s: %s; %s %s, %s CPUs, %s memory, image %s",
        settings.name,
        f" in namespace {settings.namespace}" if settings.namespace else "",
        ", ".join(steps),
        pods,
        gpus,
        settings.cpu,
        settings.memory,
        settings.image,
    )
    training, processes = config.training, max(settings.gpus, 1) * settings.nodes
    log.info(
        "a step: micro_batch_size %d x gradient_accumulation_steps %d x %s",
        training.micro_batch_size,
        training.gradient_accumulation_steps,
        "1 process" if processes == 1 else f"{processes} processes",
    )
    volume = f"claim {settings.claim}" if settings.claim else f"a new claim {settings.name} of {settings.storage}"
    log.info("the run is in %s/runs/%s, on %s", VOLUME, settings.name, volume)
    if settings.nodes > 1:
        log.info("all nodes write there at once: the volume has to allow ReadWriteMany (NFS, CephFS, EFS, ...)")
    last = settings.image.rpartition("/")[2]
    if "@" not in last and (":" not in last or last.endswith(":latest")):
        log.warning("--image %s names no version: a pod that starts again may run another one", settings.image)
