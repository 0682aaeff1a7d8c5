"""Keys of the adapter's variants: what follows from them, and what they cannot say together."""

from __future__ import annotations

import pytest

LORA = "adapter: lora\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("peft_use_dora: true", "peft_use_dora does nothing without an adapter"),
        ("lora_rank_budget: 1000", "lora_rank_budget does nothing without an adapter"),
        ("rank_pattern: {q_proj: 4}", "rank_pattern does nothing without an adapter"),
        ("peft_init_lora_weights: pissa", "does nothing without an adapter"),
        (LORA + "peft_init_lora_weights: pisa", "is true, gaussian, pissa"),
        (LORA + "peft_init_lora_weights: pissa_niter_0", "is true, gaussian, pissa"),
        (LORA + "peft_init_lora_weights: false", "is true, gaussian, pissa"),
        (LORA + "peft_init_lora_weights: loftq", "write `load_in_4bit: true`"),
        (LORA + "loftq_config: {loftq_bits: 4}", "write `load_in_4bit: true`"),
        (LORA + "load_in_8bit: true\nloftq_config: {loftq_bits: 4}", "write `load_in_4bit: true`"),
        ("adapter: qlora\nloftq_config: {loftq_bits: 8}", "loftq_bits: 8 is not what the base has"),
        ("adapter: qlora\nloftq_config: {loftq_iter: 5}", "would quantise the base anew"),
        (LORA + "loftq_config: {}", "write `load_in_4bit: true`"),
        ("adapter: qlora\nloftq_config: {bits: 4}", "loftq_config.bits is not a key of loftq_config"),
        ("adapter: qlora\npeft_init_lora_weights: pissa", "out of the base weights"),
        ("adapter: qlora\nloftq_config: {loftq_bits: 4}\npeft_init_lora_weights: eva", "is for `peft_init_lora_w"),
        (LORA + "load_in_8bit: true\npeft_init_lora_weights: olora", "which are quantised here"),
        (LORA + "lora_model_dir: a\npeft_init_lora_weights: pissa", "is for a new adapter"),
        (LORA + "lora_model_dir: a\nlora_rank_budget: 1000", "exclude each other"),
        (LORA + "lora_model_dir: a\nloftq_config: {loftq_bits: 4}\nload_in_4bit: true", "exclude each other"),
        (LORA + "rank_pattern: {q_proj: 4}\nlora_rank_budget: 1000", "exclude each other"),
        (LORA + "lora_target_parameters: [a.b]\npeft_use_dora: true", "exclude each other"),
        (LORA + "lora_target_parameters: [a.b]\nlora_dropout: 0.1", "exclude each other"),
        (LORA + "lora_target_parameters: [a.b]\npeft_init_lora_weights: pissa", "is for linear layers"),
        (LORA + "rank_pattern: {'(': 4}", "rank_pattern: '(' is not a regular expression"),
        (LORA + "alpha_pattern: {q_proj: 0}", "has to be greater than 0"),
        (LORA + "rank_pattern: {q_proj: 0}", "has to be at least 1"),
        (LORA + "rank_pattern: [q_proj]", "expected a mapping"),
        (LORA + "lora_rank_budget: 0", "has to be at least 1"),
        (LORA + "peft: {loftq_config: {loftq_bits: 4}}", "Write what is inside it at the top level"),
        (LORA + "use_dora: true", "Write `peft_use_dora: true`"),
    ],
)
def test_what_cannot_be_said_is_one_error(report, text, words):
    (message,) = report(text)
    assert words in message


def test_what_follows_from_other_keys(load):
    config = load("adapter: qlora\nloftq_config: {loftq_bits: 4}\n")
    assert config.adapter.peft_init_lora_weights == "loftq" and config.model.load_in_4bit
    config = load(LORA + "lora_target_parameters: experts.down_proj\n")
    assert config.adapter.lora_target_parameters == ["experts.down_proj"]
    assert config.adapter.lora_target_linear is None  # experts alone, unless it is written too
    config = load(LORA + "rank_pattern: {q_proj: 4}\nalpha_pattern: {q_proj: 7}\npeft_init_lora_weights: true\n")
    assert config.adapter.rank_pattern == {"q_proj": 4} and config.adapter.alpha_pattern == {"q_proj": 7.0}
    assert load(base=config.to_yaml()).adapter == config.adapter
