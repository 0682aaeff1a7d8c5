"""Every manifest is what the published schema of Kubernetes allows, and the parts fit each other."""

from __future__ import annotations

import base64
import copy
from typing import Any

import pytest
import yaml

from luthier.launch.kubernetes import manifests
from luthier.launch.kubernetes.files import Parcel
from luthier.launch.kubernetes.settings import Mount, Settings
from tests.launch.kubernetes.schema import Invalid, all_fields, validate

EVERYTHING = Settings(
    name="first",
    image="registry.example/luthier@sha256:" + "0" * 64,
    namespace="ml",
    gpus=3,
    nodes=2,
    cpu="12",
    memory="96Gi",
    shm="16Gi",
    storage="1Ti",
    storage_class="shared",
    mounts=(Mount("data", "/data", read_only=True), Mount("models", "/models")),
    secrets=("hub", "tracker:WANDB_API_KEY"),
    variables={"NCCL_DEBUG": "INFO"},
    labels={"kueue.x-k8s.io/queue-name": "team"},
    node_selector={"nvidia.com/gpu.product": "NVIDIA-H200"},
    tolerations=("team=ml:NoExecute",),
    priority_class="high",
    service_account="trainer",
    pull_secrets=("registry",),
    deadline=3600,
)
SETTINGS = {
    "cpu": Settings(name="first", image="luthier:cpu", gpus=0),
    "gpus": Settings(name="first", image="luthier:cuda", gpus=3, claim="team"),
    "everything": EVERYTHING,
}


def made(settings: Settings) -> dict[str, dict[str, Any]]:
    parcel = Parcel("cfg.yml", {"cfg.yml": b"base_model: m\n", "rows.parquet": b"PAR1\xff\x00"}, ["lora_r=8"])
    told = manifests.settings_map(settings, config="cfg.yml", base_model="m", merge=True, push="ada/first")
    return {
        "claim": manifests.claim(settings),
        "files": manifests.files_map(settings, parcel),
        "settings": told,
        "service": manifests.service(settings),
        "job": manifests.job(settings, parcel.overrides),
    }


def pod_of(job: dict[str, Any]) -> dict[str, Any]:
    return job["spec"]["template"]["spec"]


@pytest.mark.parametrize("name", SETTINGS)
def test_the_schema_of_kubernetes_holds(name: str) -> None:
    everything = made(SETTINGS[name])
    written = manifests.to_yaml(list(everything.values()))
    assert list(yaml.safe_load_all(written)) == list(everything.values())
    for manifest in everything.values():
        validate(manifest)


def test_a_misspelt_field_or_a_wrong_type_does_not_pass() -> None:
    """Each field of each manifest, but for those whose names are ours to choose."""
    tried, passed = 0, []
    for kind, manifest in made(EVERYTHING).items():
        for path in all_fields(manifest):
            ours = {"data", "binaryData", "labels", "annotations", "selector", "nodeSelector", "requests", "limits"}
            if ours & set(path[:-1]) or path[-1] in ("apiVersion", "kind", "metadata") or path == ("metadata", "name"):
                continue
            for change in ("misspelt", "wrong type"):
                broken = copy.deepcopy(manifest)
                inner = broken
                for key in path[:-1]:
                    inner = inner[key]
                if change == "misspelt":
                    inner[path[-1] + "s"] = inner.pop(path[-1])
                else:
                    inner[path[-1]] = [[]] if isinstance(inner[path[-1]], list) else ["x"]
                try:
                    validate(broken, ("1.33",))
                    passed.append(f"{kind}: {'.'.join(map(str, path))}, {change}")
                except Invalid:
                    tried += 1
    assert passed == [] and tried > 150


def test_limits_gpus_and_shared_memory() -> None:
    [container] = pod_of(made(EVERYTHING)["job"])["containers"]
    amounts = {"cpu": "12", "memory": "96Gi", "nvidia.com/gpu": "3"}
    assert container["resources"] == {"requests": amounts, "limits": amounts}
    assert "nvidia.com/gpu" not in str(made(SETTINGS["cpu"])["job"])
    volumes = {each["name"]: each for each in pod_of(made(EVERYTHING)["job"])["volumes"]}
    paths = {each["name"]: each["mountPath"] for each in container["volumeMounts"]}
    assert set(volumes) == set(paths)
    assert volumes["shm"]["emptyDir"] == {"medium": "Memory", "sizeLimit": "16Gi"}
    assert paths["shm"] == "/dev/shm"
    assert volumes["luthier"]["persistentVolumeClaim"]["claimName"] == made(EVERYTHING)["claim"]["metadata"]["name"]
    team = {each["name"]: each for each in pod_of(made(SETTINGS["gpus"])["job"])["volumes"]}
    assert team["luthier"]["persistentVolumeClaim"]["claimName"] == "team"
    variables = {each["name"]: each.get("value", "") for each in container["env"]}
    for name in ("HF_HOME", "LUTHIER_CACHE"):
        assert variables[name].startswith(paths["luthier"] + "/")


def test_it_meets_the_restricted_pod_security_standard() -> None:
    pod = pod_of(made(EVERYTHING)["job"])
    [container] = pod["containers"]
    assert pod["securityContext"]["runAsNonRoot"] is True and pod["securityContext"]["runAsUser"] > 0
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    assert pod["securityContext"]["fsGroup"] == pod["securityContext"]["runAsGroup"]
    assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)
    assert {kind for each in pod["volumes"] for kind in set(each) - {"name"}} <= {
        "configMap", "persistentVolumeClaim", "emptyDir",
    }  # fmt: skip


def test_secrets_are_names() -> None:
    everything = made(EVERYTHING)
    assert "Secret" not in {manifest["kind"] for manifest in everything.values()}
    [container] = pod_of(everything["job"])["containers"]
    assert {"secretRef": {"name": "hub"}} in container["envFrom"]
    # The settings come last: a key of a Secret must not change what the script is told.
    assert container["envFrom"][-1] == {"configMapRef": {"name": everything["settings"]["metadata"]["name"]}}
    [key] = [each for each in container["env"] if each["name"] == "WANDB_API_KEY"]
    assert key == {
        "name": "WANDB_API_KEY",
        "valueFrom": {"secretKeyRef": {"name": "tracker", "key": "WANDB_API_KEY"}},
    }


def test_several_nodes_find_each_other() -> None:
    everything = made(EVERYTHING)
    job, service, told = everything["job"], everything["service"], everything["settings"]["data"]
    spec = job["spec"]
    assert (spec["completionMode"], spec["completions"], spec["parallelism"]) == ("Indexed", 2, 2)
    # A pod's host name is JOB-INDEX, below the subdomain that has the Service's name.
    pod = job["metadata"]["name"] + "-0"
    subdomain = spec["template"]["spec"]["subdomain"]
    assert told["RDZV_ENDPOINT"] == f"{pod}.{subdomain}:{service['spec']['ports'][0]['port']}"
    assert subdomain == service["metadata"]["name"]
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"].items() <= spec["template"]["metadata"]["labels"].items()
    assert told["NODES"] == "2" and told["NUM_PROCESSES"] == "3"
    assert everything["claim"]["spec"]["accessModes"] == ["ReadWriteMany"]
    assert spec["backoffLimit"] == 2 * made(SETTINGS["gpus"])["job"]["spec"]["backoffLimit"]

    alone = made(SETTINGS["gpus"])
    assert "completionMode" not in alone["job"]["spec"] and "NODES" not in alone["settings"]["data"]
    assert alone["claim"]["spec"]["accessModes"] == ["ReadWriteOnce"]


def test_files_and_arguments_arrive_as_they_are() -> None:
    files = made(EVERYTHING)["files"]
    assert base64.b64decode(files["binaryData"]["rows.parquet"]) == b"PAR1\xff\x00"
    assert files["data"]["cfg.yml"] == "base_model: m\n"
    assert files["data"]["run.sh"] == manifests.script()
    job = manifests.job(EVERYTHING, ["datasets.0.path=$(HOME)/$x"])
    # Kubernetes: $(NAME) is a variable's value, $$ is a dollar sign.
    assert pod_of(job)["containers"][0]["args"] == ["datasets.0.path=$$(HOME)/$$x"]


def test_a_pod_that_is_to_go_has_time_and_what_cannot_be_mended_is_not_tried_again() -> None:
    spec = made(SETTINGS["gpus"])["job"]["spec"]
    assert spec["template"]["spec"]["terminationGracePeriodSeconds"] >= 300
    assert spec["template"]["spec"]["restartPolicy"] == "Never"  # podFailurePolicy asks for it
    assert spec["backoffLimit"] > 0 and spec["podReplacementPolicy"] == "Failed"
    ignored, stopped, hopeless = spec["podFailurePolicy"]["rules"]
    assert ignored["action"] == "Ignore" and ignored["onPodConditions"][0]["type"] == "DisruptionTarget"
    from luthier.errors import ConfigError, RunError
    from luthier.launch.ended import stopped_elsewhere

    assert stopped["action"] == "Ignore" and stopped["onExitCodes"]["operator"] == "In"
    assert stopped["onExitCodes"]["values"] == [stopped_elsewhere("").exit_status]
    assert hopeless["action"] == "FailJob"
    assert ConfigError.exit_status in hopeless["onExitCodes"]["values"]
    assert RunError.exit_status not in hopeless["onExitCodes"]["values"]
    assert hopeless["onExitCodes"]["containerName"] == spec["template"]["spec"]["containers"][0]["name"]
    assert "activeDeadlineSeconds" not in spec
    assert made(EVERYTHING)["job"]["spec"]["activeDeadlineSeconds"] == 3600
