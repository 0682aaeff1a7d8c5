"""deploy/kustomize: the same job as the command makes, as files."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from luthier.config import Config
from luthier.launch.kubernetes import manifests
from luthier.launch.kubernetes.settings import Settings
from tests.launch.kubernetes.conftest import documents
from tests.launch.kubernetes.schema import validate

ROOT = Path(__file__).parents[3] / "deploy" / "kustomize"
BASE = ROOT / "base"
OVERLAYS = sorted(path for path in (ROOT / "overlays").iterdir() if path.is_dir())
SETTINGS = Settings(name="luthier", image="luthier:cuda")


def read(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text())


def built(folder: Path) -> dict[str, dict]:
    """What `kubectl kustomize` makes of a folder; the hashes behind the names of ConfigMaps are taken off."""
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not here")
    done = subprocess.run(
        ["kubectl", "kustomize", str(folder)], capture_output=True, text=True, check=True, timeout=60
    )
    found = {}
    for each in yaml.safe_load_all(done.stdout):
        name = each["kind"]
        if name == "ConfigMap":
            name = "settings" if "RUN" in each["data"] else "files"
        found[name] = each
    return found


def test_the_base_is_what_the_command_makes() -> None:
    made = documents(manifests.to_yaml([manifests.job(SETTINGS), manifests.claim(SETTINGS)]))
    for manifest, path in ((made["Job"], "job.yaml"), (made["PersistentVolumeClaim"], "storage.yaml")):
        kept = read(BASE / path)
        validate(kept)
        del manifest["metadata"]["labels"]  # which kustomize adds, here and in the pods
        if path == "job.yaml":
            del manifest["spec"]["template"]["metadata"]["labels"]
        assert kept == manifest, f"{path} and luthier/launch/kubernetes/manifests.py differ: bring them together"
    assert (BASE / "run.sh").read_text() == manifests.script(), "copy luthier/launch/kubernetes/run.sh to deploy/"


def test_its_config_map_names_the_yaml_the_processes_and_the_model() -> None:
    kustomization = read(BASE / "kustomization.yaml")
    settings, files = kustomization["configMapGenerator"]
    told = dict(line.split("=", 1) for line in settings["literals"])
    config = Config.load(BASE / told["CONFIG"])
    made = manifests.settings_map(
        SETTINGS, config="cfg.yml", base_model=config.model.base_model, merge=True, push=None
    )
    assert (settings["name"], told) == (made["metadata"]["name"], made["data"])
    assert files == {"name": "luthier-files", "files": ["cfg.yml", "run.sh"]}
    assert int(told["NUM_PROCESSES"]) == int(
        read(BASE / "job.yaml")["spec"]["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"]
    )


@pytest.mark.parametrize("folder", [BASE, *OVERLAYS], ids=lambda path: path.name)
def test_kustomize_builds_valid_manifests_that_fit_each_other(folder: Path, tmp_path: Path) -> None:
    found = built(folder)
    for manifest in found.values():
        validate(manifest)
    job, told = found["Job"], found["settings"]["data"]
    pod = job["spec"]["template"]["spec"]
    [container] = pod["containers"]
    assert container["envFrom"][-1] == {"configMapRef": {"name": found["settings"]["metadata"]["name"]}}
    volumes = {each["name"]: each for each in pod["volumes"]}
    assert volumes["files"]["configMap"]["name"] == found["files"]["metadata"]["name"]
    claim = volumes["luthier"]["persistentVolumeClaim"]["claimName"]
    assert claim == found["PersistentVolumeClaim"]["metadata"]["name"]
    # As many GPUs as processes, in both places.
    for amounts in container["resources"].values():
        assert amounts["nvidia.com/gpu"] == told["NUM_PROCESSES"]
    (tmp_path / told["CONFIG"]).write_text(found["files"]["data"][told["CONFIG"]])
    assert Config.load(tmp_path / told["CONFIG"]).model.base_model == told["BASE_MODEL"]
    assert job["metadata"]["labels"].items() <= job["spec"]["template"]["metadata"]["labels"].items()
    assert "app.kubernetes.io/instance" in job["metadata"]["labels"]


@pytest.mark.parametrize("folder", OVERLAYS, ids=lambda path: path.name)
def test_an_overlay_changes_what_the_base_has(folder: Path) -> None:
    """Without kustomize: the files are there, the script knows the variables, the patches make valid manifests."""
    overlay = read(folder / "kustomization.yaml")
    assert all((folder / path).exists() for path in overlay["resources"])
    script = manifests.script()
    for generator in overlay["configMapGenerator"]:
        assert generator["behavior"] == "merge"
        for literal in generator.get("literals", []):
            assert f"#   {literal.partition('=')[0]} " in script
        for file in generator.get("files", []):
            assert (BASE / file).exists() and (folder / file).exists()
            Config.load(folder / file)
    kept = {each["kind"]: each for each in (read(BASE / "job.yaml"), read(BASE / "storage.yaml"))}
    for patch in overlay["patches"]:
        change = yaml.safe_load(patch["patch"])
        merged = merge(kept[change["kind"]], change)
        assert merged != kept[change["kind"]]
        validate(merged)


def merge(old: Any, new: Any) -> Any:
    """A strategic merge as far as it is needed here: containers by name, other lists replaced."""
    if isinstance(old, dict) and isinstance(new, dict):
        return {key: merge(old.get(key), new[key]) if key in new else old[key] for key in {**old, **new}}
    if isinstance(old, list) and all(isinstance(each, dict) and "name" in each for each in new):
        changes = {each["name"]: each for each in new}
        return [merge(each, changes.get(each["name"], {})) for each in old]
    return new


def test_two_nodes_are_those_of_the_command() -> None:
    found = built(ROOT / "overlays" / "two-nodes")
    settings = Settings(
        name="luthier", image="luthier:cuda", namespace="ml", gpus=4, nodes=2, cpu="16", memory="128Gi"
    )
    assert found["Job"]["spec"] == _without_hashes(manifests.job(settings)["spec"], found)
    assert found["Service"]["spec"] == manifests.service(settings)["spec"]
    assert found["PersistentVolumeClaim"]["spec"] == manifests.claim(settings)["spec"]
    model = found["settings"]["data"]["BASE_MODEL"]
    made = manifests.settings_map(settings, config="cfg.yml", base_model=model, merge=True, push=None)
    assert found["settings"]["data"] == made["data"]


def _without_hashes(spec: dict[str, Any], found: dict[str, dict]) -> dict[str, Any]:
    """A spec of the command that names the ConfigMaps as kustomize does."""
    text = yaml.safe_dump(spec)
    for name in ("settings", "files"):
        text = text.replace(f"luthier-{name}", found[name]["metadata"]["name"])
    return yaml.safe_load(text)
