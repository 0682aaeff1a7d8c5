"""`luthier push` against a stand-in of the hub: what arrives, what is never sent twice, and every refusal."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import constants, hf_api, snapshot_download
from huggingface_hub.utils import _http
from peft import PeftModel
from transformers import AutoModelForCausalLM

from luthier.cli import main
from luthier.data.hub import notice_missing_network
from luthier.errors import ConfigError, LuthierError, ModelError, RunError
from luthier.export import hub as export_hub
from luthier.export.hub import push
from luthier.export.scrub import Scrub
from luthier.models.assemble import open_for_inference
from luthier.models.quantize import is_quantized
from luthier.train.run import train
from tests.export.hub_server import READ_ONLY, SMALL, TOKEN, Hub, serving

REPO = "ada/adder"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serving() as server:
        monkeypatch.delenv("HF_HUB_OFFLINE")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # a storage protocol of its own
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        # Retries without their waiting.
        quick = SimpleNamespace(**{**vars(time), "sleep": lambda _: None})
        monkeypatch.setattr(_http, "time", quick)
        monkeypatch.setattr(export_hub, "time", quick)
        yield server
        notice_missing_network.cache_clear()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, toy_llama_dir: Path) -> Path:
    """A finished run of a few steps with its merge; tests must not write into it."""
    from luthier.config import Config

    folder = tmp_path_factory.mktemp("push-run")
    rows = [{"instruction": f"Add {n} and 1.", "input": "", "output": f"{n + 1}"} for n in range(12)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    values = {
        "base_model": str(toy_llama_dir),
        "datasets": [{"path": str(folder / "rows.jsonl"), "type": "alpaca"}],
        "dataset_prepared_path": str(folder / "cache"),
        "adapter": "lora",
        "lora_r": 4,
        "learning_rate": 5e-2,
        "max_steps": 2,
        "sequence_len": 256,
        "bf16": False,
        "kernels": "reference",
        "output_dir": str(folder / "run"),
    }
    train(Config.from_flat(values))
    assert main(["merge-lora", str(folder / "run"), "--no-check"]) == 0
    return folder / "run"


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    """A copy of the run, to be changed."""
    return Path(shutil.copytree(made, tmp_path / "run"))


def failed(call: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["push", *call]) in (1, 2)
    said = capsys.readouterr().err
    assert said.count("error:") == 1 and "internal" not in said and TOKEN not in said
    return said


def front_matter(card: bytes) -> dict[str, Any]:
    return yaml.safe_load(card.decode().split("---\n")[1])


# --- what arrives -------------------------------------------------------------------------------------------


def test_a_run_arrives_as_it_is(run: Path, hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["push", str(run), REPO, "--base-model", "ada/base", "--license", "apache-2.0"]) == 0
    out, said = capsys.readouterr()
    assert out == f"{hub.url}/{REPO}\n" and hub.repos[REPO].private
    assert "is new, and private" in said and TOKEN not in said
    files = hub.files(REPO)
    sent = {
        "README.md", "adapter_config.json", "adapter_model.safetensors", "chat_template.jinja", "config.yaml",
        "loss.png", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert set(files) == sent
    assert f"{REPO}: {len(sent)} files" in said
    for name in sent - {"README.md", "adapter_config.json", "config.yaml"}:
        assert files[name] == (run / name).read_bytes(), name
    before = json.loads((run / "adapter_config.json").read_text())
    assert json.loads(files["adapter_config.json"]) == {**before, "base_model_name_or_path": "ada/base"}
    front = front_matter(files["README.md"])
    assert front["base_model"] == "ada/base" and front["license"] == "apache-2.0"
    assert front["library_name"] == "peft" and {"luthier", "lora", "sft"} <= set(front["tags"])
    card = files["README.md"].decode()
    assert "\n# adder\n" in card and f'luthier generate {REPO} --prompt' in card
    assert f'PeftModel.from_pretrained(base, "{REPO}")' in card and "training loss at the end" in card
    assert "environment.json" not in card
    # Nothing of this machine.
    for name in ("README.md", "config.yaml", "adapter_config.json"):
        assert str(run.parent).encode() not in files[name] and b"/tmp" not in files[name], name
    settings = yaml.safe_load(files["config.yaml"])
    assert settings["base_model"] == "ada/base" and settings["datasets"][0]["path"] == "rows.jsonl"
    assert settings["lora_r"] == 4 and "output_dir" not in settings


def test_a_merged_model_and_gguf(run: Path, hub: Hub, caplog: pytest.LogCaptureFixture) -> None:
    (run / "adder.q8_0.gguf").write_bytes(b"GGUF" + os.urandom(3000))
    caplog.set_level(logging.INFO, "luthier")
    url = push(run, REPO, merged=True, private=False, gguf=[str(run / "adder.q8_0.gguf")], message="First")
    assert url == f"{hub.url}/{REPO}" and not hub.repos[REPO].private and hub.repos[REPO].messages == ["First"]
    files = hub.files(REPO)
    assert "merge.json" not in files and "adapter_config.json" not in files  # merge.json names local folders
    for name in ("model.safetensors", "config.json", "generation_config.json", "tokenizer.json"):
        assert files[name] == (run / "merged" / name).read_bytes(), name
    assert files["adder.q8_0.gguf"] == (run / "adder.q8_0.gguf").read_bytes()
    front = front_matter(files["README.md"])
    assert front["library_name"] == "transformers" and "gguf" in front["tags"] and "base_model" not in front
    assert "AutoPeft" not in files["README.md"].decode()
    assert "is no model on the hub" in caplog.text and "names no licence" in caplog.text


def test_a_model_folder_without_a_card(made: Path, toy_llama_dir: Path, hub: Hub) -> None:
    push(toy_llama_dir, REPO)
    card = hub.files(REPO)["README.md"].decode()
    assert f'AutoModelForCausalLM.from_pretrained("{REPO}")' in card and f"luthier generate {REPO}" in card
    assert hub.files(REPO)["model.safetensors"] == (toy_llama_dir / "model.safetensors").read_bytes()
    push(made / "merged", "ada/merged")  # the card of the run that it lies in
    assert "training loss at the end" in hub.files("ada/merged")["README.md"].decode()


def test_a_checkpoint_has_the_runs_format_and_not_its_results(run: Path, hub: Hub) -> None:
    checkpoint = next(run.glob("checkpoint-*"))
    push(checkpoint, REPO, base_model="ada/base")
    files = hub.files(REPO)
    assert {"adapter_model.safetensors", "config.yaml", "tokenizer.json"} <= set(files) and "loss.png" not in files
    assert not any(word in name for name in files for word in ("optim", "state", "rng", "train"))
    assert files["adapter_model.safetensors"] == (checkpoint / "adapter_model.safetensors").read_bytes()
    assert "training loss" not in files["README.md"].decode()


def test_a_merge_older_than_its_adapter_is_said(run: Path, hub: Hub, caplog: pytest.LogCaptureFixture) -> None:
    later = time.time() + 10
    os.utime(run / "adapter_model.safetensors", (later, later))
    push(run, REPO, merged=True)
    assert "is newer than the merged model" in caplog.text


def test_a_run_in_full(toy_llama_dir: Path, hub: Hub, tmp_path: Path) -> None:
    """No adapter: the model at the top of the run; its base came from the hub's cache."""
    run = Path(shutil.copytree(toy_llama_dir, tmp_path / "run"))
    cached = tmp_path / "hub" / "models--ada--base" / "snapshots" / ("a" * 40)
    cached.mkdir(parents=True)
    config = {"base_model": str(cached), "datasets": [{"path": "x/rows", "type": "alpaca"}]}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    push(run, REPO)
    assert front_matter(hub.files(REPO)["README.md"])["base_model"] == "ada/base"
    assert yaml.safe_load(hub.files(REPO)["config.yaml"])["base_model"] == "ada/base"


def test_a_branch(run: Path, hub: Hub) -> None:
    push(run, REPO, revision="main")
    assert push(run / "merged", REPO, revision="merged") == f"{hub.url}/{REPO}/tree/merged"
    assert "model.safetensors" in hub.files(REPO, "merged") and "model.safetensors" not in hub.files(REPO)
    assert 'revision="merged"' in hub.files(REPO, "merged")["README.md"].decode()
    push(run / "merged", REPO, revision="merged")
    assert len(hub.repos[REPO].messages) == 2


def test_an_authors_own_card_stays(run: Path, hub: Hub) -> None:
    card = (run / "README.md").read_text().replace("---\n", "---\nlicense: mit\nlanguage: de\n", 1)
    (run / "README.md").write_text(card + "\n## Limits\n\nIt cannot subtract.\n")
    push(run, REPO)
    sent = hub.files(REPO)["README.md"]
    assert front_matter(sent)["license"] == "mit" and front_matter(sent)["language"] == "de"
    assert "It cannot subtract." in sent.decode()


def test_shards_of_an_earlier_model_go(run: Path, toy_llama_dir: Path, hub: Hub) -> None:
    shutil.rmtree(run / "merged")
    AutoModelForCausalLM.from_pretrained(toy_llama_dir).save_pretrained(run / "merged", max_shard_size="100kB")
    push(run, REPO, merged=True)
    assert "model.safetensors.index.json" in hub.files(REPO)
    push(toy_llama_dir, REPO)
    assert {n for n in hub.files(REPO) if n.startswith("model")} == {"model.safetensors"}
    next((run / "merged").glob("model-00002*")).unlink()
    with pytest.raises(RunError, match="files of weights are missing"):
        push(run, REPO, merged=True)


def test_secrets_and_paths_stay_here(
    run: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ACME_API_KEY", "abcdefghijklmnop")
    with (run / "README.md").open("a") as card:
        card.write(f"\nTrained from {run}/notes.txt with {TOKEN} and abcdefghijklmnop; ")
        card.write("see https://x.org/home/y and/or z.\n")
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["datasets"][0]["path"] = "https://ada:geheim@example.org/rows.jsonl"
    config["wandb_entity"] = "acme"
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    assert main(["push", str(run), REPO]) == 0
    everything = b"".join(hub.files(REPO).values())
    for private in (TOKEN, "abcdefghijklmnop", "geheim", "acme", str(run)):
        assert private.encode() not in everything, private
    assert b"Trained from notes.txt with *** and ***; see https://x.org/home/y and/or z." in everything
    said = capsys.readouterr().err
    assert "3 secrets" in said and f"{run}/notes.txt -> notes.txt" in said


def test_what_is_a_path_of_this_machine() -> None:
    here = str(Path.home() / "models" / "my base")
    root = "/" + next(p.name for p in Path("/").iterdir() if p.is_dir())
    cached = f"{root}/x/.cache/huggingface/hub/models--ada--base/snapshots/" + "a" * 40
    assert Scrub().value([f"file://{root}/rows.jsonl"]) == ["rows.jsonl"]
    same = ["/v1/models", "a/b", "</b>", "http://h/tmp/x", "/", "and/or", "x\n/y"]
    scrub = Scrub()
    assert scrub.value({"a": [here, cached]}) == {"a": ["my base", "ada/base"]}
    assert scrub.value(same) == same and [scrub.text(text) for text in same] == same
    assert scrub.text(f"from {root}/d/e.txt, C:\\u\\v.txt and file://{root}/f") == "from e.txt, v.txt and file://f"


# --- nothing twice ------------------------------------------------------------------------------------------


def test_the_same_again_sends_nothing(run: Path, hub: Hub) -> None:
    push(run, REPO)
    sent = hub.counts.copy()
    push(run, REPO)
    assert hub.sent("^(PUT|POST .*(commit|preupload|create|batch))") == sum(
        n for name, n in sent.items() if name.startswith("PUT") or any(
            word in name for word in ("commit", "preupload", "create", "batch"))
    )  # fmt: skip
    (run / "chat_template.jinja").write_text("{{ 'another' }}")
    push(run, REPO)
    assert hub.sent("^PUT") == sum(n for name, n in sent.items() if name.startswith("PUT"))
    assert hub.files(REPO)["chat_template.jinja"] == b"{{ 'another' }}"


@pytest.mark.parametrize("multipart", [False, True])
def test_an_interrupted_push_goes_on(run: Path, hub: Hub, multipart: bool) -> None:
    """Patience has an end, and with it the command; given again, it goes on."""
    hub.multipart = multipart
    large = (run / "adapter_model.safetensors").read_bytes()
    assert len(large) > 20_000
    oid = hashlib.sha256(large).hexdigest()
    hub.broken = f"PUT /storage/{oid}"
    with pytest.raises(RunError, match="the same command goes on from there") as failure:
        push(run, REPO)
    assert "geheim" not in str(failure.value)
    assert not hub.files(REPO), "nobody sees half of it"
    assert 3 <= hub.sent(hub.broken) < hub.sent("^PUT")
    hub.broken = None
    push(run, REPO)
    assert hub.files(REPO)["adapter_model.safetensors"] == large
    for name in {name for name in hub.counts if name.startswith("PUT") and oid not in name}:
        assert hub.counts[name] == 1, "sent twice"


@pytest.mark.parametrize(
    ("pattern", "what"),
    [
        ("GET /api/whoami", 500),
        ("GET /api/models", 503),
        ("POST /api/repos/create", 502),
        ("POST /api/repos/create", "lost"),
        ("paths-info", "reset"),
        ("preupload", 429),
        ("objects/batch", "reset"),
        ("PUT /storage", 500),
        ("PUT /storage", "reset"),
        ("PUT /storage", "slow"),
        ("verify", 504),
        ("/commit/", 500),
        ("/commit/", "reset"),
        ("/commit/", "lost"),
    ],
)
def test_what_passes_is_tried_again(run: Path, hub: Hub, pattern: str, what: int | str) -> None:
    hub.trouble = [(pattern, what)]
    push(run, REPO)
    assert not hub.trouble and len(hub.repos[REPO].messages) == 1
    assert hub.files(REPO)["adapter_model.safetensors"] == (run / "adapter_model.safetensors").read_bytes()


# --- refusals -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("trouble", "says"),
    [
        ([("whoami", 401)], "does not accept the token"),
        ([("create", 403)], "does not let this token write"),
        ([("/commit/", 403)], "does not let this token write"),
        ([("create", 500)] * 3, "answered 500"),
        ([("/commit/", 500)] * 3, "the same command goes on"),
        ([("objects/batch", 401)], "does not accept the token"),
    ],
)
def test_what_does_not_pass_is_one_error(
    run: Path, hub: Hub, trouble: list[tuple[str, int | str]], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.trouble = list(trouble)
    assert says in failed([str(run), REPO], capsys)
    assert not hub.trouble and not hub.repos.get(REPO, SimpleNamespace(messages=[])).messages


def test_tokens(
    run: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "has to be eve or a member" in failed([str(run), "eve/adder"], capsys)
    monkeypatch.setenv("HF_TOKEN", READ_ONLY)
    assert "needs write access" in failed([str(run), REPO], capsys)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "does not accept the token" in failed([str(run), REPO], capsys)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    assert "no token for" in failed([str(run), REPO], capsys)
    assert not hub.repos
    (tmp_path / "token").write_text(TOKEN)  # what `hf auth login` leaves
    push(run, REPO)
    push(run, "ada/other", token=TOKEN)
    assert set(hub.repos) == {REPO, "ada/other"}


def test_visibility_is_never_changed(run: Path, hub: Hub, caplog: pytest.LogCaptureFixture) -> None:
    push(run, "ada/open", private=False)
    with pytest.raises(ConfigError, match="is public, and a push is private"):
        push(run, "ada/open")
    push(run, "ada/closed")
    push(run, "ada/closed", private=False)
    assert hub.repos["ada/closed"].private and "it stays so" in caplog.text
    with pytest.raises(ConfigError, match="holds an adapter"):
        push(run, "ada/closed", merged=True)


def test_a_gitignore_there_and_a_card_that_is_refused(run: Path, hub: Hub) -> None:
    hub.ignored = {"loss.png"}
    with pytest.raises(RunError, match=r"did not take loss\.png"):
        push(run, REPO)
    with pytest.raises(RunError, match="refuses the model card"):
        push(run, REPO, base_model="none-such")


def _unfinished(run: Path) -> None:
    (run / "adapter_config.json").unlink()


@pytest.mark.parametrize(
    ("spoil", "options", "says"),
    [
        (None, ["adder"], "is owner/name"),
        (None, ["ada/adder/x"], "cannot be a repository's name"),
        (None, ["ada/ad der"], "cannot be a repository's name"),
        (None, ["https://huggingface.co/ada/adder"], "cannot be a repository's name"),
        (None, ["ada/"], "is owner/name"),
        (_unfinished, [REPO], "has not ended yet"),
        (lambda run: (run / "adapter_model.safetensors").unlink(), [REPO], "is missing"),
        (lambda run: shutil.rmtree(run / "merged"), [REPO, "--merged"], "luthier merge-lora"),
        (lambda run: (run / "config.yaml").write_text("a: ["), [REPO], "cannot be read"),
        (lambda run: (run / "README.md").write_text("---\n[1\n---\n"), [REPO], "front matter"),
        (lambda run: (run / "report.html").unlink(missing_ok=True), [REPO, "--report"], "luthier report"),
        (None, [REPO, "--gguf", "README.md"], "is no GGUF file"),
        (None, [REPO, "--gguf", "none.gguf"], "cannot be read"),
        (None, [REPO, "--base-model", "/a/b"], "is no id on the hub"),
    ],
)
def test_one_clear_error_before_anything_is_asked(
    spoil: Callable[[Path], Any] | None,
    options: list[str],
    says: str,
    run: Path,
    hub: Hub,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if spoil is not None:
        spoil(run)
    assert says in failed([str(run), *options], capsys)
    assert not hub.counts


def test_folders_that_hold_nothing(made: Path, hub: Hub, tmp_path: Path) -> None:
    for target, says in {
        tmp_path / "none": "does not exist",
        made / "config.yaml": "is a file",
        tmp_path: "neither a run, an adapter nor a model",
    }.items():
        with pytest.raises(LuthierError, match=says):
            push(target, REPO)
    with pytest.raises(ConfigError, match="leave --merged out"):
        push(made / "merged", REPO, merged=True)


def test_dry_run_asks_nothing(made: Path, hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["push", str(made), REPO, "--dry-run", "--report"]) == 0
    out, said = capsys.readouterr()
    assert not out and not hub.counts and "adapter_model.safetensors (" in said and "report.html (" in said


def test_without_network(
    made: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving() as other:
        gone = other.url
    monkeypatch.setattr(constants, "ENDPOINT", gone)
    assert failed([str(made), REPO], capsys).count("cannot be reached (") == 1
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    push(made, REPO)  # in the same process, when the network is back
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "HF_HUB_OFFLINE is set" in failed([str(made), REPO], capsys)


# --- and back -----------------------------------------------------------------------------------------------


def test_an_adapter_without_a_base_says_so(run: Path, hub: Hub, tmp_path: Path) -> None:
    push(run, REPO)
    assert json.loads(hub.files(REPO)["adapter_config.json"])["base_model_name_or_path"] is None
    for name, content in hub.files(REPO).items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelError, match="does not say which base"):
        open_for_inference(str(tmp_path))


def test_what_was_pushed_loads_from_the_hub(
    run: Path,
    hub: Hub,
    toy_llama_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The base, the adapter and the merged model, each by its id alone."""
    resolve = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", resolve)
    monkeypatch.setattr(hf_api.api, "endpoint", hub.url)  # of the functions that are no methods
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    push(toy_llama_dir, "ada/base")
    push(run, REPO, base_model="ada/base")
    config_yaml = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config_yaml.replace("load_in_8bit: false", "load_in_8bit: true"))
    push(run, "ada/merged", merged=True)  # and is not rounded to 8 bits when it is loaded
    (run / "config.yaml").write_text(config_yaml)
    folder = Path(snapshot_download(REPO))
    assert {name: (folder / name).read_bytes() for name in hub.files(REPO)} == hub.files(REPO)

    ids = torch.tensor([[5, 6, 7, 8]])
    here, _, _ = open_for_inference(str(run), dtype=torch.float32)
    shutil.rmtree(run)  # nothing of it is needed
    for name in (REPO, "ada/merged"):
        model, tokenizer, config = open_for_inference(name, dtype=torch.float32)
        assert torch.allclose(model(input_ids=ids).logits, here(input_ids=ids).logits, atol=2e-2, rtol=0)  # 16 bits
        assert config is not None and config.adapter.lora_r == 4 and tokenizer.chat_template
        assert config.model.load_in_8bit == (name == "ada/merged") and not is_quantized(model)
    base, _, config = open_for_inference("ada/base", dtype=torch.float32)
    assert (base(input_ids=ids).logits - here(input_ids=ids).logits).abs().max() > 0.1
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("ada/base", dtype=torch.float32), REPO)
    torch.testing.assert_close(theirs(input_ids=ids).logits, here(input_ids=ids).logits, atol=1e-4, rtol=0)
    assert main(["generate", REPO, "--prompt", "Add 1 and 1.", "--max-new-tokens", "4"]) == 0
    capsys.readouterr()

    # Without network, from the cache.
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    again, _, _ = open_for_inference(REPO, dtype=torch.float32)
    assert torch.equal(again(input_ids=ids).logits, here(input_ids=ids).logits)
    with pytest.raises(ModelError, match="hub"):
        open_for_inference("ada/none-such")


def test_the_stand_in_sends_large_files_to_the_storage(run: Path, hub: Hub) -> None:
    """Else the tests of resuming would test nothing."""
    push(run, REPO)
    assert (run / "adapter_model.safetensors").stat().st_size > SMALL
    assert hub.sent("^PUT /storage/") >= 2
