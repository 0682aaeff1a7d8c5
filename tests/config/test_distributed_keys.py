"""Keys about several processes: both spellings, presets and JSON files, names of other tools, and what cannot be said
together."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from luthier.config import Config
from luthier.config.distributed import ELSEWHERE, INSIDE_FSDP, FsdpConfig
from luthier.config.optimizers import OPTIMIZERS
from luthier.config.schema import FIELDS
from luthier.config.zero import OPTIMIZERS as OF_DEEPSPEED
from luthier.config.zero import PRESETS, stage_of, zero_settings

FSDP, ZERO = "fsdp_version: 2\n", "deepspeed: zero2\n"
LORA = "adapter: lora\n"

# --- values -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "strategy"),
    [
        ("", "replicas"),
        ("ddp: true", "replicas"),
        (FSDP, "fsdp"),
        (FSDP + "ddp: false\nfsdp_config: {}", "fsdp"),
        (ZERO, "deepspeed"),
    ],
)
def test_strategy(load, text, strategy):
    assert load(text).distributed.strategy == strategy


def test_both_spellings_are_one_key(load):
    config = load(
        FSDP
        + "fsdp_config:\n"
        + "  fsdp_reshard_after_forward: false\n"
        + "  offload_params: true\n"
        + "  fsdp_offload_params: true\n"  # says the same
        + "  fsdp_cpu_offload_pin_memory: null\n"
        + "  cpu_offload_pin_memory: false\n"
        + "  fsdp_state_dict_type: sharded_state_dict\n"
        + "  fsdp_transformer_layer_cls_to_wrap: LlamaDecoderLayer, GemmaDecoderLayer\n"
    )
    fsdp = config.distributed.fsdp
    assert (fsdp.reshard_after_forward, fsdp.offload_params, fsdp.cpu_offload_pin_memory) == (False, True, False)
    assert fsdp.state_dict_type == "SHARDED_STATE_DICT"
    assert fsdp.layer_classes == ["LlamaDecoderLayer", "GemmaDecoderLayer"]
    assert config.origins["fsdp_config.reshard_after_forward"] == "cfg.yml:7"
    assert load(FSDP).distributed.fsdp == FsdpConfig()


def test_overrides_reach_inside_in_either_spelling(load):
    text = FSDP + "fsdp_config: {fsdp_offload_params: true, reshard_after_forward: false}\n"
    config = load(text, "fsdp_config.offload_params=false", "--fsdp_config.fsdp_reshard_after_forward", "true")
    fsdp = config.distributed.fsdp
    assert (fsdp.offload_params, fsdp.reshard_after_forward) == (False, True)
    config = load("", "fsdp_version=2", "fsdp_config={fsdp_offload_params: true}")
    assert config.distributed.fsdp.offload_params


def test_what_a_run_writes_is_read_again(load, tmp_path):
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 1, "reduce_bucket_size": 5e8}}')
    texts = (
        FSDP + "fsdp_config: {fsdp_offload_params: true, state_dict_type: SHARDED_STATE_DICT}\ndp_shard_size: 2\n",
        FSDP + "fsdp_config: {activation_checkpointing: true}\nddp_timeout: 60\n",
        "deepspeed: zero3_offload\n",
        "deepspeed: ds.json\n",
        "ddp: true\n",
    )
    for text in texts:
        config = load(text)
        again = load(base=config.to_yaml())
        assert again.flat() == config.flat()
        assert again.distributed == config.distributed


def test_from_python():
    given = {"base_model": "m", "datasets": [{"path": "d", "type": "alpaca"}], "fsdp_version": 2}
    for inside in (FsdpConfig(offload_params=True), {"fsdp_offload_params": True}):
        config = Config.from_flat({**given, "fsdp_config": inside})
        assert config.distributed.fsdp.offload_params
        assert config.flat()["fsdp_config"] == {"offload_params": True}
    assert config.replace("a test", fsdp_config={"offload_params": False}).distributed.fsdp == FsdpConfig()
    assert config.replace("a test", fsdp_version=None).distributed.strategy == "replicas"


def test_checkpointing_inside_is_the_key_outside(load):
    inside = FSDP + "fsdp_config: {fsdp_activation_checkpointing: true}\n"
    config = load(inside)
    assert config.precision.gradient_checkpointing is True
    assert config.origins["gradient_checkpointing"] == "derived: from fsdp_config.activation_checkpointing"
    # What keeps less still, and in the host's memory, is no contradiction; nor is `false` inside.
    text = FSDP + "fsdp_config: {activation_checkpointing: true, offload_params: true}\n"
    assert load(text + "gradient_checkpointing: offload\n").precision.gradient_checkpointing == "offload"
    inside = FSDP + "fsdp_config: {activation_checkpointing: false}\n"
    assert load(inside + "gradient_checkpointing: true\n").precision.gradient_checkpointing is True
    assert load(inside).precision.gradient_checkpointing == "auto"


# --- deepspeed ----------------------------------------------------------------------------------------------------


def test_presets(load):
    stages = {name: stage_of(load(f"deepspeed: {name}\n").distributed.zero) for name in PRESETS}
    assert stages == {"zero1": 1, "zero2": 2, "zero3": 3, "zero3_offload": 3}
    offload = zero_settings("zero3_offload")["zero_optimization"]
    assert offload["offload_param"]["device"] == offload["offload_optimizer"]["device"] == "cpu"
    offload["offload_param"]["device"] = "none"  # a copy: nobody changes the preset
    assert zero_settings("zero3_offload")["zero_optimization"]["offload_param"]["device"] == "cpu"


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_what_deepspeed_takes(name):
    """Against DeepSpeed's own reader, which refuses keys that it does not know."""
    config = pytest.importorskip("deepspeed.runtime.zero.config")
    settings = zero_settings(name)
    assert config.DeepSpeedZeroConfig(**settings["zero_optimization"]).stage == stage_of(settings)


# As other tools ship them: "auto" for what the YAML says, an optimizer of no more than a name, loss scaling left in.
FILE = {
    "zero_optimization": {
        "stage": 2,
        "reduce_bucket_size": "auto",
        "overlap_comm": False,
        "offload_optimizer": {"device": "cpu", "pin_memory": "auto"},
    },
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": 1,
    "bf16": {"enabled": "auto"},
    "fp16": {"enabled": False, "loss_scale": 0},
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto"}},
    "zero_allow_untested_optimizer": True,
    "steps_per_print": 100,
}


def test_a_file_becomes_part_of_the_config(load, tmp_path):
    (tmp_path / "ds.json").write_text(json.dumps(FILE))
    config = load("deepspeed: ds.json\n")
    assert config.distributed.zero == config.distributed.deepspeed
    assert config.distributed.zero == {
        "zero_optimization": {"stage": 2, "overlap_comm": False, "offload_optimizer": {"device": "cpu"}},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 100,
    }
    assert config.origins["deepspeed"] == "derived: read from ds.json"
    (tmp_path / "ds.json").unlink()  # what the run wrote does without it
    assert load(base=config.to_yaml()).distributed.zero == config.distributed.zero
    written = load("deepspeed: {zero_optimization: {stage: 3, reduce_bucket_size: auto}}\n")
    assert written.distributed.zero == {"zero_optimization": {"stage": 3}}


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"zero_optimization": {"stage": 4}}, "a `stage` from 1 to 3, and has 4"),
        ({"zero_optimization": {"stage": 0}}, "stage 0 shares nothing"),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}},
            "offload_param to nvme is not built",
        ),
        ({"zero_optimization": {"stage": True}}, "a `stage` from 1 to 3, and has True"),
        ({"zero_optimization": {}}, "a `stage` from 1 to 3, and has None"),
        ({"zero_optimization": 2}, "a `stage` from 1 to 3"),
        ({"train_batch_size": 8}, "micro_batch_size x gradient_accumulation_steps x processes makes it"),
        ({"train_micro_batch_size_per_gpu": 4}, "is 4 there, and micro_batch_size is 2"),
        ({"gradient_accumulation_steps": 2}, "is 2 there, and gradient_accumulation_steps is 1"),
        ({"gradient_clipping": 0.5}, "is 0.5 there, and max_grad_norm is 1.0"),
        ({"bf16": {"enabled": True}}, "bf16 is on there: write `bf16: true` in the YAML too"),
        ({"bf16": {"enabled": False}}, "bf16 is off there: write `bf16: false` in the YAML too"),
        ({"bf16": {"enabled": "yes"}}, "bf16.enabled has to be true, false or auto"),
        ({"bf16": {"enabled": "auto", "immediate_grad_update": True}}, "leave all but `enabled` out"),
        ({"fp16": {"enabled": True, "loss_scale": 0}}, "fp16 is on there: write `fp16: true` in the YAML too"),
        ({"optimizer": {"type": "Lamb", "params": {}}}, "optimizer is made from the YAML"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 1e-4}}}, "optimizer is made from the YAML"),
        ({"scheduler": {"type": "WarmupLR", "params": {}}}, "scheduler is made from the YAML"),
        ({"curriculum_learning": {"enabled": True}}, "curriculum_learning is not passed on"),
    ],
)
def test_files_that_say_something_else_than_the_yaml(report, tmp_path, changed, words):
    (tmp_path / "ds.json").write_text(json.dumps(FILE | changed))
    (line,) = report("deepspeed: ds.json\n")
    assert line.startswith("cfg.yml:5: deepspeed: ds.json: ")
    assert words in line


def test_files_that_agree_with_the_yaml(load, tmp_path):
    said = {"bf16": {"enabled": True}, "gradient_accumulation_steps": 4, "gradient_clipping": 0.5}
    (tmp_path / "ds.json").write_text(json.dumps(FILE | said))
    load("deepspeed: ds.json\nbf16: true\ngradient_accumulation_steps: 4\nmax_grad_norm: 0.5\n")
    (tmp_path / "ds.json").write_text(json.dumps(FILE | {"bf16": {"enabled": False}, "fp16": {"enabled": True}}))
    load("deepspeed: ds.json\nfp16: true\nadapter: lora\n")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("zero4", "is none of zero1, zero2, zero3, zero3_offload, and as a file it cannot be read"),
        ("deepspeed_configs/zero2.json", "Luthier's own settings of that stage are `deepspeed: zero2`"),
        ("zero3_bf16_cpuoffload_all.json", "are `deepspeed: zero3_offload`"),
        ("broken.json", "broken.json is not JSON: Expecting"),
        ("list.json", "has to be a mapping of DeepSpeed's settings"),
        ("2", "Write zero2."),
        ("[zero2]", "expected text or a mapping, found a list"),
    ],
)
def test_values_of_deepspeed_that_are_none(report, tmp_path, text, words):
    (tmp_path / "broken.json").write_text("{stage: 2}")
    (tmp_path / "list.json").write_text("[]")
    (line,) = report(f"deepspeed: {text}\n")
    assert line.startswith("cfg.yml:5: ") and words in line


# --- bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        # values
        ("fsdp_version: 1", "expected 2, found the number 1. FSDP's first version"),
        ("fsdp_version: '2'", "expected 2, found the text '2'. Leave out the quotes."),
        ("fsdp_version: true", "expected 2, found true"),
        ("ddp_timeout: 0", "has to be at least 1"),
        (FSDP + "dp_replicate_size: 0", "has to be at least 1"),
        (FSDP + "fsdp_config: {fsdp_offload_params: 'true'}", "found the text 'true'. Leave out the quotes."),
        (FSDP + "fsdp_config: [offload]", "expected a mapping, found a list"),
        (FSDP + "fsdp_config: {state_dict_type: LOCAL_STATE_DICT}", "Write SHARDED_STATE_DICT."),
        (FSDP + "fsdp_config: {fsdp_state_dict_type: FULL}", "Did you mean FULL_STATE_DICT?"),
        (FSDP + "fsdp_config: {final_state_dict_type: SHARDED_STATE_DICT}", "in ordinary files: leave it out"),
        (FSDP + "fsdp_config: {auto_wrap_policy: size_based_wrap}", "What is gathered at once is one layer"),
        (FSDP + "fsdp_config: {reshard_after_forward: FULL_SHARD}", "found the text 'FULL_SHARD'. Write true."),
        (FSDP + "fsdp_config: {fsdp_use_orig_params: false}", "fsdp_config.use_orig_params cannot be false"),
        (FSDP + "fsdp_config: {cpu_ram_efficient_loading: false}", "cannot be false"),
        (FSDP + "fsdp_config: {sync_module_states: false}", "cannot be false"),
        (FSDP + "fsdp_config: {cpu_offload_pin_memory: false}", "write `offload_params: true` beside it"),
        (
            FSDP + "fsdp_config: {offload_params: true, fsdp_offload_params: false}",
            "fsdp_config.fsdp_offload_params and fsdp_config.offload_params are one key with different values",
        ),
        # keys
        (FSDP + "fsdp_config: {fsdp_ofload_params: true}", "Did you mean offload_params?"),
        (FSDP + "fsdp_config: {fsdp_version: 2}", "Write `fsdp_version: 2` at the top level."),
        (FSDP + "fsdp_config: {version: 2}", "Write `fsdp_version: 2` at the top level."),
        (FSDP + "fsdp_config: {learning_rate: 1}", "It belongs at the top level."),
        ("fsdp_transformer_layer_cls_to_wrap: L", "It belongs inside fsdp_config."),
        ("offload_params: true", "It belongs inside fsdp_config."),
        ("distributed: {ddp: true}", "write what is inside distributed at the top level"),
        # of one strategy beside another
        (FSDP + "deepspeed: zero2", "fsdp_version and deepspeed exclude each other"),
        (FSDP + "ddp: true", "ddp and fsdp_version exclude each other"),
        (ZERO + "ddp: true", "ddp and deepspeed exclude each other"),
        ("ddp: false", "write `fsdp_version: 2` or `deepspeed: zero2`"),
        ("fsdp_config: {offload_params: true}", "does nothing without fsdp_version: write `fsdp_version: 2`, or"),
        (ZERO + "fsdp_config: {}", "write `fsdp_version: 2` in place of deepspeed"),
        ("dp_shard_size: 2", "every process has a copy: write `fsdp_version: 2`, or leave dp_shard_size out"),
        ("dp_replicate_size: 2", "leave dp_replicate_size out"),
        (ZERO + "dp_shard_size: 2", "write `fsdp_version: 2` in place of deepspeed"),
        (FSDP + "dp_shard_size: 1", "`dp_shard_size: 1` shares nothing"),
        (
            FSDP + "fsdp_config: {fsdp_activation_checkpointing: true}\ngradient_checkpointing: false",
            "activation_checkpointing is true and gradient_checkpointing false",
        ),
        # beside the rest
        *(
            (strategy + text, words)
            for strategy in (FSDP, ZERO)
            for text, words in (
                ("optimizer_in_backward: true\nmax_grad_norm: 0", "or optimizer_in_backward."),
                ("bf16_stochastic_rounding: true", "or bf16_stochastic_rounding."),
                (LORA + "load_in_8bit: true", "or load_in_8bit."),
                (LORA + "load_in_fp8: true", "or load_in_fp8."),
                ("fp16: true", "write `bf16: true` in place of fp16"),
            )
        ),
        (FSDP + LORA + "load_in_4bit: true\ndequantized_copies_gib: 1", "keeps whole weights in every process"),
        ("deepspeed: zero3\n" + LORA + "load_in_4bit: true", "write `fsdp_version: 2` in place of deepspeed"),
        ("deepspeed: zero3\nadapter: qlora", "ZeRO's stage 3 cannot share out weights in 4 bits"),
        ("deepspeed: {zero_optimization: {stage: 3}}\nadapter: qlora", "cannot share out weights in 4 bits"),
    ],
)
def test_what_cannot_be_said_is_one_error(report, text, words):
    (message,) = report(text + "\n")
    assert words in message


@pytest.mark.parametrize(
    "text",
    [
        FSDP + "adapter: qlora",
        ZERO + "adapter: qlora",
        "deepspeed: zero3\n" + LORA,
        FSDP + LORA + "fp16: true",
        FSDP + "dp_replicate_size: 2",
        FSDP + "dp_shard_size: 2\ndp_replicate_size: 1",
        "ddp: true\nddp_timeout: 3600\noptimizer_in_backward: true\nmax_grad_norm: 0",
        FSDP + LORA + "optimizer: adafactor",
        ZERO + LORA + "load_in_4bit: true\ndequantized_copies_gib: 1",
        FSDP + "fsdp_config: {fsdp_cpu_ram_efficient_loading: true, sync_module_states: true, use_orig_params: true, "
        "fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP, final_state_dict_type: full_state_dict}",
    ],
)
def test_what_goes_together(load, text):
    load(text + "\n")


def test_optimizers_that_treat_every_number_by_itself(load, report):
    """Shares of a trained model are no matrices, and no blocks of 256; of an adapter every process has the whole."""
    refused = {"adafactor", "muon"} | {name for name in OPTIMIZERS if "8bit" in name}
    for name in OPTIMIZERS:
        text = f"{FSDP}optimizer: {name}\n"
        if name in refused:
            (line,) = report(text)
            assert f"`optimizer: {name}`" in line and "write adamw_torch_fused, or leave out fsdp_version" in line
        else:
            load(text)
        if name != "muon":  # which is for no adapter anyway
            load(text + LORA)
        if name in OF_DEEPSPEED:
            load(f"{ZERO}optimizer: {name}\n{LORA}")
        elif name != "muon":
            (line,) = report(f"{ZERO}optimizer: {name}\n{LORA}")
            assert f"`optimizer: {name}` is not for deepspeed" in line


def test_all_contradictions_at_once(report):
    lines = report(FSDP + ZERO + "ddp: true\ndp_shard_size: 1\nfp16: true\noptimizer: muon\nring_attn_func: x\n")
    assert len(lines) == 8
    assert lines[-1].startswith("cfg.yml:11: ring_attn_func is not a key of the config. Leave it out")


@pytest.mark.parametrize(
    "key",
    [
        "context_parallel_size",
        "sequence_parallel_degree",
        "tensor_parallel_size",
        "expert_parallel_size",
        "pipeline_parallel_size",
        "heads_k_stride",
        "ring_attn_func",
        "fsdp",
        "fsdp_final_state_dict_type",
        "ddp_bucket_cap_mb",
        "ddp_broadcast_buffers",
        "ddp_find_unused_parameters",
        "accelerator_config",
        "deepcompile",
        "use_ray",
        "ray_num_workers",
    ],
)
def test_keys_of_other_tools_are_refused_by_name(report, key):
    (line,) = report(f"{key}: 2\n")
    assert line == f"cfg.yml:5: {key} is not a key of the config. {ELSEWHERE[key]}"
    assert ELSEWHERE[key].startswith(("Write ", "Leave it out: "))


def test_keys_of_other_tools_are_none_of_ours():
    assert not set(ELSEWHERE) & set(FIELDS)
    assert not set(INSIDE_FSDP) & set(FsdpConfig.model_fields)


@pytest.mark.parametrize("key", INSIDE_FSDP)
@pytest.mark.parametrize("prefix", ["", "fsdp_"])
def test_keys_of_other_tools_inside_fsdp_config(report, key, prefix):
    (line,) = report(f"{FSDP}fsdp_config:\n  {prefix}{key}: 1\n")
    assert line.endswith(INSIDE_FSDP[key])


def test_the_file_may_be_anywhere(load, tmp_path):
    path = Path(tmp_path / "there" / "ds.json")
    path.parent.mkdir()
    path.write_text('{"zero_optimization": {"stage": 1}}')
    assert stage_of(load(f"deepspeed: {path}\n").distributed.zero) == 1
    assert stage_of(load("", "--deepspeed", str(path)).distributed.zero) == 1
