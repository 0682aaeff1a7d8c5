"""`luthier launch kubernetes`: what is refused before anything is written, what is written, what is applied."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from luthier.config import Config
from luthier.config.schema import FIELDS
from luthier.launch.kubernetes.settings import name_from
from tests.launch.kubernetes.conftest import Launch, documents
from tests.launch.kubernetes.schema import validate

TOKEN = "hf_" + "a1B2" * 8


def nothing_written(folder: Path) -> bool:
    return not (folder / "kubernetes").exists()


def test_a_dry_run_prints_valid_manifests_and_writes_nothing(launch: Launch, folder: Path) -> None:
    status, out, err = launch("--gpus", "3", "--namespace", "ml", "--dry-run", "--lora_r", "32")
    assert status == 0
    found = documents(out)
    for manifest in found.values():
        validate(manifest)
        assert manifest["metadata"]["namespace"] == "ml"
    assert set(found) == {"PersistentVolumeClaim", "files", "settings", "Job"}
    assert found["settings"]["data"] == {
        "CONFIG": "first.yml", "RUN": "first", "NUM_PROCESSES": "3", "BASE_MODEL": "owner/model", "MERGE": "true",
        "PUSH": "",
    }  # fmt: skip
    assert found["files"]["data"]["first.yml"] == (folder / "first.yml").read_text()
    assert found["files"]["data"]["rows.jsonl"] == (folder / "rows.jsonl").read_text()
    arguments = found["Job"]["spec"]["template"]["spec"]["containers"][0]["args"]
    assert arguments == ["--lora_r", "32", "datasets.0.path=/config/rows.jsonl"]
    in_the_pod = Config.load("first.yml", arguments)
    assert in_the_pod.adapter.lora_r == 32 and in_the_pod.data.datasets[0].path == "/config/rows.jsonl"
    assert "rows.jsonl travels in the ConfigMap" in err
    assert "train, merge-lora; a pod of 3 nvidia.com/gpu, 12 CPUs, 96Gi memory" in err
    assert "nothing was applied" in err and "kubectl -n ml logs -f job/first" in err
    assert nothing_written(folder)


def test_it_loads_no_torch(folder: Path) -> None:
    code = (
        "import sys; from luthier.cli import main; "
        "assert main(['launch', 'kubernetes', 'first.yml', '--image', 'i:1', '--dry-run']) == 0; "
        "print('LOADED', sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "LOADED []"


def test_it_writes_and_applies(launch: Launch, folder: Path, kubectl: Path) -> None:
    status, out, err = launch("--namespace", "ml", "--context", "prod", "--nodes", "2")
    assert (status, out) == (0, "")
    asked = kubectl.read_text().splitlines()
    assert [line.partition("-n ml ")[2] for line in asked] == [
        "get job first --ignore-not-found -o name",
        "apply --server-side --field-manager luthier -f kubernetes/first/storage.yaml -f kubernetes/first/job.yaml",
    ]
    assert all("--context prod" in line for line in asked)
    storage = documents((folder / "kubernetes/first/storage.yaml").read_text())
    job = documents((folder / "kubernetes/first/job.yaml").read_text())
    # Apart, so that what is deleted with the job does not hold what it made.
    assert set(storage) == {"PersistentVolumeClaim"} and set(job) == {"files", "settings", "Service", "Job"}
    for command in (
        "kubectl --context prod -n ml logs -f -l app.kubernetes.io/instance=first",
        "kubectl --context prod -n ml delete job first",
        "kubectl --context prod -n ml delete job,service,configmap -l app.kubernetes.io/instance=first",
        "kubectl --context prod -n ml delete pvc first",
    ):
        assert command in err
    assert "ReadWriteMany" in err


def test_a_job_that_is_there_is_left_alone(launch: Launch, folder: Path, kubectl: Path) -> None:
    Path(f"{kubectl}.there").write_text("job.batch/first\n")
    status, _, err = launch()
    assert status == 2 and "kubectl delete job first" in err
    assert "apply" not in kubectl.read_text() and nothing_written(folder)


def test_what_the_cluster_says_is_shown(launch: Launch, kubectl: Path) -> None:
    Path(f"{kubectl}.fails").write_text('Error from server (NotFound): namespaces "ml" not found\n')
    status, _, err = launch("--namespace", "ml")
    assert status == 1 and 'error: kubectl apply: Error from server (NotFound): namespaces "ml" not found' in err
    assert "follow" not in err


def test_without_kubectl_the_folder_is_the_way(launch: Launch, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(folder))
    status, _, err = launch()
    assert status == 1 and "--dry-run --out FOLDER" in err and nothing_written(folder)
    status, out, err = launch("--dry-run", "--out", "there")
    assert (status, out) == (0, "")
    assert "kubectl apply --server-side -f there/storage.yaml -f there/job.yaml" in err
    # With a claim of one's own there is none to make, and none is left from before.
    assert launch("--dry-run", "--out", "there", "--claim", "team")[0] == 0
    assert [path.name for path in (folder / "there").iterdir()] == ["job.yaml"]


def test_a_config_that_is_wrong_goes_nowhere(launch: Launch, folder: Path, kubectl: Path) -> None:
    with (folder / "first.yml").open("a") as file:
        file.write("lora_rank: 8\n")
    status, _, err = launch()
    assert status == 2 and "first.yml:6" in err and "lora_rank" in err
    assert not kubectl.exists() and nothing_written(folder)
    assert launch("--gpu", "3")[0] == 2  # a misspelt option is no key either


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--secret", TOKEN], "kubectl create secret"),
        (["--secret", f"HF_TOKEN={TOKEN}"], "kubectl create secret"),
        (["--secret", "s3cr3t/Value+1="], "kubectl create secret"),
        (["--env", f"SOMETHING={TOKEN}"], "--env SOMETHING"),
        (["--env", "WANDB_API_KEY=0123456789abcdef0123456789abcdef01234567"], "--env WANDB_API_KEY"),
        (["--env", f"HTTPS_PROXY=http://ada:{TOKEN}@proxy"], "--env HTTPS_PROXY"),
        (["--push", f"ada/{TOKEN}", "--secret", "hub"], "--push"),
        (["--label", f"note={TOKEN}"], "--label holds"),
        (["--node-selector", f"{TOKEN}=a"], "--node-selector holds"),
        (["--pull-secret", TOKEN], "--pull-secret holds"),
        (["--mount", TOKEN], "--mount holds"),
        (["--toleration", f"a={TOKEN}"], "--toleration holds"),
        ([f"--wandb_name={TOKEN}"], "command line"),
    ],
)
def test_a_secret_is_never_more_than_a_name(
    launch: Launch, folder: Path, kubectl: Path, options: list[str], message: str
) -> None:
    status, out, err = launch(*options)
    assert status == 2 and message in err
    for text in (TOKEN, options[-1] if options[0] == "--secret" else TOKEN, "0123456789abcdef"):
        assert text not in out + err
    assert not kubectl.exists() and nothing_written(folder)


def test_a_token_in_the_yaml_is_refused_even_where_the_yaml_is_wrong(launch: Launch, folder: Path) -> None:
    with (folder / "first.yml").open("a") as file:
        file.write(f"hub_token: {TOKEN}\n")
    status, _, err = launch("--dry-run")
    assert status == 2 and "first.yml holds what looks like a token" in err and TOKEN not in err


def test_a_key_of_this_shell_is_recognised(launch: Launch, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef0123456789abcdef01234567")
    status, _, err = launch("--dry-run", "--wandb_name", "0123456789abcdef0123456789abcdef01234567")
    assert status == 2 and "0123456789" not in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--name", "First"], "--name First"),
        (["--name", "a" * 51], "--name"),
        (["--gpus", "-1"], "--gpus -1"),
        (["--nodes", "0"], "--nodes 0"),
        (["--retries", "-1"], "--retries"),
        (["--user", "0"], "root"),
        (["--namespace", "my_team"], "--namespace my_team"),
        (["--storage", "100G!"], "--storage 100G!"),
        (["--storage", "100"], "write a unit"),
        (["--memory", "0"], "--memory 0"),
        (["--cpu", "four"], "--cpu four"),
        (["--cpu", "0.0001"], "a thousandth"),
        (["--shm", "64Gi", "--memory", "64Gi"], "shared memory is a part"),
        (["--deadline", "soon"], "--deadline soon"),
        (["--mount", "data"], "CLAIM:/path"),
        (["--mount", "data:/luthier/x"], "the pod's own"),
        (["--mount", "a:/data", "--mount", "b:/data"], "two volumes"),
        (["--mount", "Data:/data"], "--mount Data"),
        (["--mount", "data:/data/../etc"], "CLAIM:/path"),
        (["--claim", "a" * 254], "up to 253"),
        (["--image", "https://registry.example/luthier:0.1"], "--image"),
        (["--label", "app.kubernetes.io/instance=mine"], "the job itself"),
        (["--env", "RUN=other"], "the job itself sets"),
        (["--secret", "hub:JOB_UID"], "the job itself sets"),
        (["--secret", "hub:KEY", "--secret", "team:KEY"], "KEY: this variable is given twice"),
        (["--env", "A=1", "--secret", "hub:A"], "A: this variable is given twice"),
        (["--secret", "hub", "--secret", "hub"], "given twice"),
        (["--gpus", "3", "--fsdp_version", "2", "--dp_shard_size", "2"], "which is 3"),
        (["--nodes", "2", "--adapter", "null", "--optimizer_in_backward", "true", "--max_grad_norm", "0"], "--gpus 1"),
        (["--toleration", "team:Never"], "NoExecute"),
        (["--node-selector", "pool"], "write KEY=VALUE"),
        (["--label", "team=a b"], "--label team=a b"),
        (["--label", "team=a", "--label", "team=b"], "twice"),
        (["--env", "1X=2"], "--env 1X"),
        (["--gpu-resource", "gpu"], "--gpu-resource"),
        (["--priority-class", "High!"], "--priority-class"),
        (["--push", "first", "--secret", "hub"], "owner/name"),
        (["--push", "ada/first"], "HF_TOKEN"),
        (["--push", "ada/first", "--secret", "team:WANDB_API_KEY"], "HF_TOKEN"),
        (["--merge", "--adapter", "null"], "nothing to merge"),
        (["--resume_from_checkpoint", "first-run/checkpoint-5"], "by itself"),
    ],
)
def test_what_kubernetes_would_refuse_later_is_refused_at_once(
    launch: Launch, folder: Path, kubectl: Path, options: list[str], message: str
) -> None:
    status, _, err = launch(*options)
    assert status == 2 and message in err, err
    assert err.count("error:") == 1 and not kubectl.exists() and nothing_written(folder)


def test_the_image_is_needed_and_one_without_a_version_is_said(launch: Launch) -> None:
    status, _, err = launch("--dry-run", image="")
    assert status == 2 and "--image is missing" in err
    assert launch("--dry-run", image="a b")[0] == 2
    for image, warned in (
        ("luthier", True),
        ("luthier:latest", True),
        ("registry.example:5000/luthier", True),
        ("luthier:0.1", False),
        ("luthier@sha256:0", False),
    ):
        status, _, err = launch("--dry-run", image=image)
        assert status == 0 and ("names no version" in err) == warned


def test_there_is_no_other_place_to_launch_on(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from luthier import cli

    assert cli.main(["launch", "moon", "first.yml", "--image", "i:1"]) == 2
    assert "luthier launch kubernetes" in capfd.readouterr().err


# --- what a config names and the pod cannot see --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["base_model=model"], "Put it on the hub"),
        (["base_model=./nowhere/model"], "neither an id"),
        (["tokenizer_config=model"], "tokenizer_config: model is on this machine"),
        (["lora_model_dir=model"], "lora_model_dir: model is on this machine"),
        (["datasets.0.path=folder"], "only single files travel"),
        (["datasets.0.path=*.jsonl"], "only single files travel"),
        (["datasets.0.path=missing.jsonl"], "no such file here"),
        (["datasets.0.path=big.jsonl"], "900,000 bytes"),
    ],
)
def test_what_cannot_be_in_the_pod_is_an_error(
    launch: Launch, folder: Path, overrides: list[str], expected: str
) -> None:
    for name in ("model", "folder"):
        (folder / name).mkdir()
    (folder / "big.jsonl").write_bytes(b"x" * 900_000)
    status, _, err = launch("--dry-run", *overrides)
    assert status == 2 and expected in err


def test_what_the_pod_sees_stays_and_what_is_small_travels(launch: Launch, folder: Path) -> None:
    (folder / "template.jinja").write_text("{{ messages }}")
    (folder / "test").mkdir()
    (folder / "test" / "rows.jsonl").write_text('{"instruction": "b", "output": "b"}\n')
    (folder / "rows.parquet").write_bytes(b"PAR1\xff")
    rows = [
        {"path": "rows.jsonl#5", "type": "alpaca"},
        {"path": "/data/rows.jsonl", "type": "alpaca"},
        {"path": "tatsu-lab/alpaca", "type": "alpaca"},
        {"path": "/in/the/image.jsonl", "type": "alpaca"},
        {"path": "parquet", "data_files": ["rows.parquet"], "type": "alpaca"},
        {"path": str(folder / "rows.jsonl"), "type": "alpaca"},
    ]
    config = {
        "base_model": "/models/llama", "datasets": rows, "chat_template": "template.jinja", "adapter": "lora",
        "test_datasets": [{"path": "test/rows.jsonl", "type": "alpaca"}], "dataset_prepared_path": "prepared",
        "output_dir": "./here", "overwrite_output_dir": True, "saves_per_epoch": 0,
    }  # fmt: skip
    (folder / "second one.yml").write_text(yaml.safe_dump(config))
    status, out, err = launch(
        "--dry-run", "--mount", "models:/models:ro", "--mount", "data:/data", "--output_dir", "./there",
        "--resume_from_checkpoint", config="second one.yml",
    )  # fmt: skip
    assert status == 0, err
    found = documents(out)
    job, files = found["Job"], found["files"]
    validate(job)
    arguments = job["spec"]["template"]["spec"]["containers"][0]["args"]
    assert job["metadata"]["name"] == "second-one"
    assert arguments[:3] == ["--output_dir", "./there", "--resume_from_checkpoint"]  # the script's own come behind
    assert dict(argument.split("=", 1) for argument in arguments[3:]) == {
        "chat_template": "/config/template.jinja",
        "dataset_prepared_path": "/luthier/datasets",
        "datasets.0.path": "/config/rows.jsonl#5",
        "datasets.4.data_files": '["/config/rows.parquet"]',
        "datasets.5.path": "/config/rows.jsonl",
        "test_datasets.0.path": arguments[-1].partition("=")[2],
    }
    other = arguments[-1].rpartition("/")[2]
    assert other != "rows.jsonl" and '"b"' in files["data"][other]  # two files of one name are two
    assert files["data"]["rows.jsonl"] == (folder / "rows.jsonl").read_text()
    assert set(files["binaryData"]) == {"rows.parquet"}
    assert set(files["data"]) == {"run.sh", "second_one.yml", "template.jinja", "rows.jsonl", other}
    assert "/in/the/image.jsonl is below no volume of the pod" in err
    for said in ("overwrite_output_dir", "saves_per_epoch: 0"):
        assert said in err
    [container] = job["spec"]["template"]["spec"]["containers"]
    mounts = {each["mountPath"]: each.get("readOnly") for each in container["volumeMounts"]}
    assert mounts["/models"] is True and mounts["/data"] is None


def test_deepspeed_s_file_travels_as_what_it_says(launch: Launch, folder: Path) -> None:
    (folder / "zero.json").write_text('{"zero_optimization": {"stage": 2}}')
    status, out, err = launch("--dry-run", "--gpus", "2", "--deepspeed", "zero.json")
    assert status == 0, err
    arguments = documents(out)["Job"]["spec"]["template"]["spec"]["containers"][0]["args"]
    (folder / "zero.json").unlink()
    kept = [each for each in arguments if each.startswith("deepspeed=")]
    assert Config.load("first.yml", kept).distributed.zero == {"zero_optimization": {"stage": 2}}
    assert "deepspeed=" not in str(launch("--dry-run", "--gpus", "2", "--deepspeed", "zero2")[1])


def test_names_come_from_files() -> None:
    assert name_from("My Run_2") == "my-run-2"
    assert name_from("8b") == "luthier-8b"
    assert name_from("数据") == "luthier"
    assert len(name_from("a" * 49 + "-b")) <= 50 and not name_from("a" * 49 + "-b").endswith("-")


def test_a_tracker_without_its_key_is_said(launch: Launch) -> None:
    assert "WANDB_API_KEY" in launch("--dry-run", "--report_to", "wandb")[2]
    assert "WANDB_API_KEY" not in launch("--dry-run", "--report_to", "wandb", "--secret", "tracker")[2]
    assert "WANDB_API_KEY" not in launch("--dry-run", "--report_to", "wandb", "--wandb_mode", "offline")[2]


def test_a_run_without_an_adapter_is_not_merged(launch: Launch) -> None:
    status, out, _ = launch("--dry-run", "--adapter", "null")
    assert status == 0 and documents(out)["settings"]["data"]["MERGE"] == "false"
    assert documents(launch("--dry-run", "--no-merge")[1])["settings"]["data"]["MERGE"] == "false"


def test_no_option_hides_a_key_of_the_config() -> None:
    from luthier.cli import VERBS
    from luthier.completion import EVERYWHERE, _keys, options_of

    own = {name.lstrip("-").replace("-", "_") for name in set(options_of(VERBS["launch"])) - set(EVERYWHERE)}
    keys = set(_keys())
    assert keys == set(FIELDS) and len(own) > len(keys)
    assert not {"image", "gpus", "nodes", "secret", "env", "push", "merge", "name", "label", "user", "out"} & keys


def test_a_config_of_axolotl_and_artifacts_as_model_and_data(launch: Launch, folder: Path) -> None:
    (folder / "theirs.yml").write_text(
        "base_model: wandb:team/lab/base:v1\n"
        "datasets:\n  - path: wandb:team/lab/rows:v2/train.jsonl#100\n    type: alpaca\n"
        "adapter: lora\nlora_r: 8\nlora_target_linear: true\nsequence_len: 512\nmicro_batch_size: 1\n"
        "flash_attention: true\noutput_dir: ./out\n"
    )
    status, out, err = launch("--dry-run", config="theirs.yml")
    assert status == 0, err
    assert "flash_attention -> attn_implementation: flash_attention_2" in err and err.count("read as Axolotl") == 1
    found = documents(out)
    assert found["files"]["data"]["theirs.yml"] == (folder / "theirs.yml").read_text()  # the pod converts it as well
    assert "args" not in found["Job"]["spec"]["template"]["spec"]["containers"][0]  # nothing has to be elsewhere there
    assert "wandb wants WANDB_API_KEY" in err
