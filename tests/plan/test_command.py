"""`luthier plan`: parameters as training counts them, what fits, what it costs, and one message for each mistake."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml

from luthier import cli
from luthier.config import Config
from luthier.errors import ConfigError
from luthier.models.assemble import make_trainable
from luthier.models.load import count_parameters
from luthier.plan import cards, measured
from luthier.plan.command import plan_of
from luthier.plan.engine import Engine
from luthier.plan.families import FAMILIES, family_of, sizes
from luthier.plan.memory import memory_of
from luthier.plan.plan import pass_of, sequence_of
from luthier.plan.work import Work, flops_per_token
from luthier.train.run import train
from tests.models.families import FAMILIES as TOYS
from tests.models.families import OTHERS, toy_config, toy_model

Plan = Callable[..., tuple[int, str, str]]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    lines = [{"instruction": f"Add {n} and {n}.", "input": "", "output": f"{2 * n}" * (1 + n % 5)} for n in range(30)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def plan(tmp_path: Path, rows: Path, toy_llama_dir: Path, capfd: pytest.CaptureFixture[str]) -> Plan:
    """plan(*arguments, **keys) -> status, stdout, stderr."""

    def run(*arguments: str, **keys: Any) -> tuple[int, str, str]:
        path = tmp_path / "cfg.yml"
        values = {
            "base_model": str(toy_llama_dir),
            "datasets": [{"path": str(rows), "type": "alpaca"}],
            "adapter": "lora",
            "lora_r": 4,
            "sequence_len": 512,
            **keys,
        }
        path.write_text(yaml.safe_dump({k: v for k, v in values.items() if v is not None}))
        status = cli.main(["plan", str(path), *arguments])
        return status, *capfd.readouterr()

    return run


def planned(plan: Plan, *arguments: str, **keys: Any) -> dict[str, Any]:
    status, out, err = plan("--json", *arguments, **keys)
    assert status == 0, err
    found: dict[str, Any] = json.loads(out)
    return found


# --- parameters ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [*TOYS, *OTHERS])
@pytest.mark.parametrize("adapter", ["lora", None])
def test_parameters_are_those_that_training_would_count(family: str, adapter: str | None, tmp_path: Path) -> None:
    toy_config(family).save_pretrained(tmp_path)
    values: dict[str, Any] = {"adapter": adapter, "lora_r": 3} if adapter else {}
    config = Config.from_flat(
        {"base_model": str(tmp_path), "datasets": [{"path": "x", "type": "completion"}], **values}
    )
    model = toy_model(family)
    make_trainable(model, config)
    shape = plan_of(config, cards.card_named("a100"), rows=10, tokens=1000).shape
    assert (shape.trainable, shape.total) == count_parameters(model)


@pytest.mark.parametrize(
    "values",
    [
        dict(lora_target_modules=["q_proj", "down_proj"], lora_modules_to_save=["lm_head"]),
        dict(lora_target_modules="all-linear", peft_use_dora=True),
        dict(peft_layers_to_transform=[1], rank_pattern={"v_proj": 7}),
        dict(adapter=None, lora_r=None, train_last_n_layers=1),
        dict(adapter=None, lora_r=None, unfrozen_parameters=["model.layers.0.mlp"]),
    ],
)
def test_targets_and_frozen_parts_as_in_training(
    values: dict[str, Any], plan: Plan, toy_llama_dir: Path
) -> None:
    found = planned(plan, "--rows", "10", **values)["parameters"]
    model = transformers.AutoModelForCausalLM.from_pretrained(toy_llama_dir)
    flat = {"adapter": "lora", "lora_r": 4, **values}
    config = Config.from_flat(
        {
            "base_model": str(toy_llama_dir),
            "datasets": [{"path": "x", "type": "completion"}],
            **{k: v for k, v in flat.items() if v is not None},
        }
    )
    make_trainable(model, config)
    assert (found["trainable"], found["total"]) == count_parameters(model)


# --- the data, the work, the cost ---------------------------------------------------------------------------


def test_tokens_and_steps_are_those_of_a_run(plan: Plan, rows: Path, toy_llama_dir: Path, tmp_path: Path) -> None:
    found = planned(plan, micro_batch_size=4, num_epochs=2)
    result = train(
        Config.from_flat(
            {
                "base_model": str(toy_llama_dir),
                "datasets": [{"path": str(rows), "type": "alpaca"}],
                "adapter": "lora",
                "lora_r": 4,
                "sequence_len": 512,
                "micro_batch_size": 4,
                "num_epochs": 2,
                "bf16": False,
                "output_dir": str(tmp_path / "run"),
            }
        )
    )
    assert found["work"]["steps"] == result.state.step == 16
    assert found["work"]["tokens"] == result.state.tokens
    assert found["work"]["labelled"] == pytest.approx(result.state.trained_tokens / result.state.tokens)

    # and that run's speed can be taken for another's
    arguments = ("--measured", str(tmp_path / "run"), "--price-per-hour", "3")
    again = planned(plan, *arguments, micro_batch_size=4, num_epochs=2)
    speed = result.state.tokens / result.state.seconds
    assert again["speed"]["tokens_per_second"] == pytest.approx(speed, rel=1e-6)
    assert again["speed"]["hours"] * 3600 * speed == pytest.approx(result.state.tokens)
    assert again["speed"]["cost"] == pytest.approx(3 * again["speed"]["hours"])


def test_a_run_reports_prediction_and_measurement(
    rows: Path,
    toy_llama_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    values = {
        "base_model": str(toy_llama_dir),
        "datasets": [{"path": str(rows), "type": "alpaca"}],
        "adapter": "lora",
        "max_steps": 2,
        "sequence_len": 512,
        "bf16": False,
        "overwrite_output_dir": True,
        "output_dir": str(tmp_path / "run"),
    }
    peaks = iter([0.01, 3.0])  # of the process: at the beginning and at the end
    monkeypatch.setattr(measured, "peak_memory_gib", lambda device: next(peaks))
    found = train(Config.from_flat(values)).summary
    assert found["measured_peak_gib"] == 3.0
    # What the toy needs is nothing beside the interpreter.
    assert 0.05 < found["predicted_peak_gib"] < 3.0
    said = f"{found['predicted_peak_gib']:.2f} GiB predicted, 3.00 GiB measured"
    assert said in capfd.readouterr().err
    assert "| peak memory, GiB | 3.00 |" in (tmp_path / "run" / "README.md").read_text()

    # A run that has ended is not lost to a model that cannot be planned for.
    caplog.set_level("INFO")

    def fails(*arguments: Any, **options: Any) -> None:
        raise ZeroDivisionError("no layers")

    with monkeypatch.context() as patch:
        patch.setattr(measured, "training_shape", fails)
        patch.setattr(measured, "peak_memory_gib", lambda device: 0.01)
        assert "measured_peak_gib" not in train(Config.from_flat(values)).summary
    assert "peak memory was not predicted: ZeroDivisionError" in caplog.text

    # A process that held more before tells nothing of this run.
    monkeypatch.setattr(measured, "peak_memory_gib", lambda device: 7.0)
    assert "measured_peak_gib" not in train(Config.from_flat(values)).summary
    assert "peak memory was not measured" in caplog.text


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """Some of them with a prompt that is too short to be worth sharing."""
    path = tmp_path / "pairs.jsonl"
    row = {"prompt": "Go on: ", "chosen": "one, two, three", "rejected": "no"}
    varied = [{"prompt": f"Count {n} and go on: " * (n % 4) or "a", "chosen": "one, " * (1 + n % 7)} for n in range(12)]
    path.write_text("".join(json.dumps({**row, **each}) + "\n" for each in varied))
    return path


@pytest.mark.parametrize(
    ("rl", "keys", "passes"),
    [
        ("orpo", {}, 0),
        ("orpo", {"train_on_inputs": False, "share_prefixes": "off"}, 0),
        ("dpo", {}, 1),
        ("dpo", {"precompute_ref_log_probs": True}, 0.5),
        ("kto", {}, 3),
        ("kto", {"precompute_ref_log_probs": True}, 2.5),
    ],
)
def test_work_of_a_preference_run(
    plan: Plan, pairs: Path, toy_llama_dir: Path, tmp_path: Path, rl: str, keys: dict[str, Any], passes: float
) -> None:
    """Steps, tokens and labels as the run counts them, prompts shared as it shares them, and how often the models run
    without a gradient."""
    from luthier.models.policy import Policy

    seen: list[int] = []  # tokens of passes without gradient, since the run has begun
    forward = Policy.forward

    def counting(policy: Any, batch: Any) -> Any:
        seen.append(0 if torch.is_grad_enabled() else len(batch.input_ids))
        return forward(policy, batch)

    # Dropout, so that nothing but prompts is shared.
    values = dict(rl=rl, datasets=[{"path": str(pairs)}], micro_batch_size=4, num_epochs=2, lora_dropout=0.1, **keys)
    values |= {"sequence_len": 512, "dataset_prepared_path": str(tmp_path / "cache")}
    found = planned(plan, **values)["work"]
    run = {"base_model": str(toy_llama_dir), "adapter": "lora", "lora_r": 4, "bf16": False}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Policy, "forward", counting)
        state = train(Config.from_flat({**run, **values, "output_dir": str(tmp_path / "run")})).state
    assert found["unit"] == ("answers" if rl == "kto" else "pairs")
    assert (found["steps"], found["tokens"]) == (state.step, state.tokens)
    computed = found["computed"] * found["tokens"]
    assert computed == pytest.approx(state.computed_tokens)
    assert (computed < found["tokens"]) == (rl != "kto" and "share_prefixes" not in keys)
    assert found["labelled"] * computed == pytest.approx(state.trained_tokens)
    assert found["forward_only"] == passes
    # Answers behind other prompts have the same tokens in all.
    assert sum(seen) == pytest.approx(passes * computed)


def test_a_preference_run_holds_the_plan_to_account(
    pairs: Path, toy_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The largest training pass, with its prompts once; neither the reference's passes nor those of evaluation; and its
    copy of the weights is no part of the interpreter's share."""
    noted: list[tuple[Any, Any, Any, Any]] = []
    real = measured.memory_of

    def noting(shape: Any, engine: Any, one: Any) -> Any:
        noted.append((shape, engine, one, real(shape, engine, one)))
        return noted[-1][-1]

    monkeypatch.setattr(measured, "memory_of", noting)
    monkeypatch.setattr(measured, "peak_memory_gib", lambda device: 0.01 if not noted else 3.0)
    held = [0.5, 1.0]  # at the start, and at the first pass
    monkeypatch.setattr(measured, "_resident_gib", lambda: held[0] if len(held) == 1 else held.pop(0))
    values = {"base_model": str(toy_llama_dir), "datasets": [{"path": str(pairs)}], "rl": "dpo", "bf16": False}
    values |= {"micro_batch_size": 4, "max_steps": 3, "sequence_len": 512}
    values |= {"val_set_size": 4, "logging_steps": 1, "eval_steps": 1}
    result = train(Config.from_flat({**values, "output_dir": str(tmp_path / "run")}))
    ((shape, engine, one, memory),) = noted
    assert engine.reference and not engine.weighted
    assert memory.reference == 4 * shape.total
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    computed = [0, *(row["computed_tokens"] for row in rows if "loss" in row)]
    assert one.tokens == max(after - before for before, after in pairwise(computed))
    assert one.documents <= 8 and one.masked_once > 0 and one.gathered > one.tokens and not one.several
    expected = 1.0 + (memory.total - 2 * 4 * shape.total) / 2**30
    assert result.summary["predicted_peak_gib"] == pytest.approx(expected, abs=1e-6)


def test_pairs_that_are_only_stated(plan: Plan) -> None:
    far = [{"path": "no/such-set"}]
    found = planned(plan, "--rows", "1000", datasets=far, rl="dpo")["work"]
    # Two sides of 512 tokens, half of each the shared prompt.
    assert (found["tokens"], found["steps"], found["unit"]) == (1000 * 1024, 500, "pairs")
    assert (found["longest"], found["mean"], found["computed"]) == (1024, 768, 0.75)
    assert found["labelled"] == pytest.approx(512 / 768)
    alone = planned(plan, "--rows", "1000", datasets=far, rl="orpo", share_prefixes="off", max_prompt_len=128)["work"]
    assert (alone["computed"], alone["shared"]) == (1.0, 0.0)
    assert alone["labelled"] == pytest.approx((2 * 384 + 128) / 1024)  # the prompt of the chosen side too
    assert planned(plan, "--rows", "10", datasets=far, rl="kto")["work"]["tokens"] == 5120
    status, out, _ = plan("--memory", "2GiB", datasets=far, rl="dpo", adapter=None, lora_r=None)
    assert status == 0 and "both answers with the prompt taken to be sequence_len long" in out
    assert "longest pair" in out and "a copy of the starting values" in out
    status, out, _ = plan("--memory", "2GiB", "--fit", datasets=far, rl="dpo")
    assert status == 0 and "one pair, both answers with the prompt as long" in out
    status, _, err = plan("--tokens", "10241", "--rows", "10", datasets=far, rl="dpo")
    assert status == 2 and "either answer of a pair with its prompt has at least one token and at most" in err


def test_stated_tokens_and_rows_take_the_place_of_the_data(plan: Plan) -> None:
    found = planned(plan, "--rows", "1000", "--tokens", "50000", datasets=[{"path": "no/such-set", "type": "alpaca"}])
    assert found["work"]["steps"] == 500 and found["work"]["tokens"] == 50000 and found["work"]["mean"] == 50
    packed = planned(plan, "--tokens", "102400", sample_packing=True, micro_batch_size=2)
    assert packed["work"]["steps"] == 100
    cut = planned(plan, "--rows", "1000", "--tokens", "50000", max_steps=50)
    assert cut["work"]["tokens"] == 5000


def test_data_that_is_not_at_hand_is_said(plan: Plan) -> None:
    status, out, err = plan(datasets=[{"path": "someone/some-set", "type": "alpaca"}])
    assert status == 0, err
    assert "someone/some-set not on this machine, not read" in out and "--tokens" in out


def test_work_of_a_token_is_two_for_each_multiply() -> None:
    """Against torch's own count of a forward and a backward pass, with everything trained, and with norms alone, as
    for adapters: gradients pass through all of the model, and no matrix has one."""
    from torch.utils.flop_counter import FlopCounterMode

    from luthier.plan.shape import shape_of

    for frozen in (False, True):
        model = toy_model("llama", vocab_size=256, num_hidden_layers=8)
        for parameter in model.parameters():
            parameter.requires_grad_(not frozen or parameter.dim() == 1)
        model.set_attn_implementation("eager")  # torch counts no fused attention on a CPU
        ids = torch.randint(0, 128, (1, 64))
        with FlopCounterMode(display=False) as counter:
            model.train()(input_ids=ids, labels=ids).loss.backward()
        work = Work("", 1, 64, 64, 64.0, 64.0, 1.0, None, None)
        shape = shape_of(model)
        # Eager attention multiplies what the mask takes out as well.
        attention = 6 * len(shape.layers) * shape.query_width * 64
        assert (flops_per_token(shape, work, Engine()) + attention) * 64 == pytest.approx(
            counter.get_total_flops(), rel=0.03
        )


# --- cards --------------------------------------------------------------------------------------------------


def test_what_fits_a_card_fits_and_more_does_not(plan: Plan, toy_llama_dir: Path, rows: Path) -> None:
    config = Config.from_flat(
        {
            "base_model": str(toy_llama_dir),
            "datasets": [{"path": str(rows), "type": "alpaca"}],
            "adapter": "lora",
            "gradient_checkpointing": False,
        }
    )
    card = cards.Card("c", 2**30)
    made = plan_of(config, card)
    assert made.tokens_fit and made.sequence_fits
    for tokens, make in ((made.tokens_fit, pass_of), (made.sequence_fits, sequence_of)):
        assert memory_of(made.shape, made.engine, make(made.work, tokens)).total <= card.room
        assert memory_of(made.shape, made.engine, make(made.work, round(1.01 * tokens))).total > card.room


def test_auto_recomputes_only_where_memory_asks_for_it(plan: Plan) -> None:
    def mode(*arguments: str) -> str:
        return str(planned(plan, "--rows", "100", *arguments, sequence_len=60000)["settings"]["recompute"])

    modes = [mode("--memory", f"{size}MiB") for size in (4000, 890, 800, 730)]
    assert modes[0] == "keep" and modes[-1] == "layer"
    order = ["keep", "norms", "mlp", "layer"]
    assert [order.index(each) for each in modes] == sorted(order.index(each) for each in modes)


def test_methods_are_compared(plan: Plan) -> None:
    found = planned(plan, "--gpu", "l4", "--rows", "10")
    lines = {line["method"]: line for line in found["methods"]}
    assert list(lines) == ["full", "LoRA", "8-bit LoRA", "QLoRA"]
    weights = [lines[name]["weights"] for name in ("full", "LoRA", "8-bit LoRA", "QLoRA")]
    assert weights[0] == weights[1] > weights[2] > weights[3]
    assert lines["full"]["thumb"] == 16 * lines["full"]["trainable"]
    assert sum(found["memory"][part] for part in found["memory"] if part not in ("total", "moment")) == pytest.approx(
        found["memory"]["total"], abs=10
    )


@pytest.mark.parametrize(
    ("text", "size"),
    [("24GiB", 24 * 2**30), ("80 GB", 80 * 10**9), ("24G", 24 * 2**30), ("512MiB", 2**29), ("1.5gib", 1.5 * 2**30)],
)
def test_sizes(text: str, size: float) -> None:
    assert cards.parse_memory(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "24", "24 apples", "-1GiB", "0GiB", "1e9GiB"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(ConfigError, match="--memory"):
        cards.parse_memory(text)


@pytest.mark.parametrize(
    ("name", "card"),
    [("H100", "h100"), ("RTX 4090", "rtx4090"), ("NVIDIA A100-80GB", "a100-80"), ("Tesla T4", "t4")],
)
def test_names_of_cards(name: str, card: str) -> None:
    assert cards.card_named(name).name == card


def test_a_t4_computes_in_fp16_and_on_a_cpu_it_is_the_machine_that_says(plan: Plan) -> None:
    assert planned(plan, "--gpu", "t4", "--rows", "10")["settings"]["compute"] == 2
    assert planned(plan, "--gpu", "h100", "--rows", "10", bf16=False)["settings"]["compute"] == 4
    assert planned(plan, "--rows", "10", device_map="cpu", bf16=False)["settings"]["compute"] == 4


# --- the inverse --------------------------------------------------------------------------------------------


def test_fit_finds_the_largest_of_a_family(plan: Plan) -> None:
    arguments = ("--fit", "--num-gpus", "3", "--memory", "48GiB", "--family", "llama-2")
    found = planned(plan, *arguments)["fits"]
    by_method = {
        method: [one["size"] for one in found if one["method"] == method and one["fits"]]
        for method in ("full", "LoRA", "QLoRA")
    }
    # 70B in 16 bits are 128 GiB, a third of them 43, and two gathered layers and the context leave no room; a quarter
    # of it does.
    assert by_method == {"full": ["7B"], "LoRA": ["7B", "13B"], "QLoRA": ["7B", "13B", "70B"]}
    status, out, _ = plan(*arguments)
    assert status == 0 and "QLoRA: 70B" in out and "full sharding" in out


def test_fit_of_a_model_that_no_table_has(plan: Plan) -> None:
    found = planned(plan, "--fit", "--gpu", "t4")
    assert {one["size"] for one in found["fits"]} == {"this model"} and found["num_gpus"] == 1


# As the models' own cards or files give them.
PUBLISHED = {
    ("llama-2", "7B"): 6_738_415_616,
    ("llama-3", "1B"): 1_235_814_400,
    ("llama-3", "8B"): 8_030_261_248,
    ("llama-3", "70B"): 70_553_706_496,
    ("qwen2.5", "0.5B"): 494_032_768,
    ("qwen2.5", "7B"): 7_615_616_512,
    ("qwen3", "8B"): 8_190_735_360,
    ("gemma-2", "2B"): 2_614_341_888,
    ("gemma-2", "9B"): 9_241_705_984,
    ("gemma-3", "1B"): 999_885_952,
    ("mistral", "7B"): 7_248_023_552,
    ("smollm2", "135M"): 134_515_008,
    ("smollm2", "1.7B"): 1_711_376_384,
}


@pytest.mark.parametrize("family", FAMILIES)
def test_families_have_their_published_sizes(family: str) -> None:
    for size, described in sizes(family).items():
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(described)
        total = count_parameters(model)[1]
        number = float(size.split("M")[0]) * 1e6 if size.endswith("M") else float(size.split("B")[0]) * 1e9
        assert total == PUBLISHED.get((family, size), total)
        assert total == pytest.approx(number, rel=0.35)
        assert family_of(described) is not None


# --- mistakes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--gpu", "h1oo"], "Did you mean h100?"),
        (["--gpu", "abacus"], "--memory 24GiB"),
        (["--memory", "much"], "'much' is no size"),
        (["--gpu", "t4", "--memory", "3GiB"], "keep one"),
        (["--fit"], "--gpu NAME or --memory SIZE"),
        (["--fit", "--memory", "9GiB", "--family", "llama-9"], "there are llama-2"),
        (["--fit", "--gpu", "t4", "--interconnect", "pcie3"], "--interconnect does nothing with --fit"),
        (["--measured", "nowhere"], "nowhere"),
        (["--measured", ".", "--tokens-per-second", "3"], "keep one"),
        (["--mfu", "0.5", "--memory", "9GiB"], "name the card with --gpu"),
        (["--fit", "--memory", "9GiB", "--price-per-hour", "3"], "--price-per-hour does nothing with --fit"),
        (["--tokens", "9", "--rows", "10"], "a document has at least one token"),
        (["--tokens", "99999", "--rows", "10"], "at most sequence_len (512)"),
    ],
)
def test_mistakes_on_the_command_line(arguments: list[str], words: str, plan: Plan) -> None:
    status, _, err = plan(*arguments)
    assert status == 2 and words in err and "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "keys", "stored", "words"),
    [
        (["--gpu", "a100-80"], {"load_in_fp8": True}, None, "a100-80 has no multiply for it"),
        ([], {"load_in_fp8": True, "device_map": "cpu"}, None, "a CPU has no multiply for it"),
        (["--gpu", "t4"], {"device_map": "cpu"}, None, "leave one of the two out"),
        ([], {}, {"quant_method": "gptq", "bits": 4}, "is quantised by gptq"),
        ([], {"adapter": None, "lora_r": None}, {"load_in_4bit": True}, "cannot be trained"),
        ([], {"load_in_8bit": True}, {"load_in_4bit": True}, "is stored in another format (4bit)"),
    ],
)
def test_what_training_would_refuse_is_not_planned(
    arguments: list[str],
    keys: dict[str, Any],
    stored: dict[str, Any] | None,
    words: str,
    plan: Plan,
    toy_llama_dir: Path,
    tmp_path: Path,
) -> None:
    described = json.loads((toy_llama_dir / "config.json").read_text())
    if stored is not None:
        described["quantization_config"] = stored
    (tmp_path / "config.json").write_text(json.dumps(described))
    status, _, err = plan("--rows", "10", *arguments, base_model=str(tmp_path), **keys)
    assert status == 2 and words in err


def test_a_config_json_with_a_wrong_value(plan: Plan, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": "wide"}))
    status, _, err = plan("--rows", "10", base_model=str(tmp_path))
    assert status == 1 and "cannot load the model" in err and "hidden_size" in err


@pytest.mark.parametrize("name", ["num_attention_heads", "num_key_value_heads", "hidden_size"])
def test_a_config_json_with_nothing_of_something(name: str, plan: Plan, toy_llama_dir: Path, tmp_path: Path) -> None:
    described = json.loads((toy_llama_dir / "config.json").read_text())
    described.pop("head_dim", None)
    (tmp_path / "config.json").write_text(json.dumps(described | {name: 0}))
    status, _, err = plan("--rows", "10", base_model=str(tmp_path))
    assert status == 1 and "its config.json describes no model: " in err and name in err


def test_a_folder_without_a_config(plan: Plan, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    status, _, err = plan("--rows", "1", base_model=str(tmp_path / "empty"))
    assert status == 1 and "cannot load the model" in err


def test_a_model_without_a_head(plan: Plan, tmp_path: Path) -> None:
    bare = transformers.AutoConfig.for_model("llama", vocab_size=64, hidden_size=32, num_hidden_layers=1)
    bare.save_pretrained(tmp_path / "bare")
    status, _, err = plan("--rows", "1", base_model=str(tmp_path / "bare"), model_type="LlamaModel")
    assert status == 1 and "no output head" in err


def test_a_model_that_writes_nothing(plan: Plan, tmp_path: Path) -> None:
    transformers.AutoConfig.for_model("t5").save_pretrained(tmp_path / "t5")
    status, _, err = plan("--rows", "1", base_model=str(tmp_path / "t5"))
    assert status == 1 and "must be a causal language model" in err


def test_no_weights_are_read(plan: Plan, toy_llama_dir: Path, tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((toy_llama_dir / name).read_bytes())
    status, out, err = plan("--gpu", "h100", base_model=str(tmp_path))
    assert status == 0, err
    assert "it fits" in out and "trainable" in out
