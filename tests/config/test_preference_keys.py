"""Keys of preference tuning: what follows from them, what they cannot say together, and what other tools call them."""

from __future__ import annotations

import pytest

from luthier.config.names import ELSEWHERE
from luthier.config.preference import READ_BY
from luthier.config.schema import FIELDS

BASE = "base_model: m\ndatasets:\n  - path: d.jsonl\n"
DPO, KTO, SIMPO = "rl: dpo\n", "rl: kto\n", "rl: simpo\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        # a method that is none
        ("rl: grpo", "Methods that generate answers while they train are not here"),
        ("rl: bco", "write `rl: dpo` and `dpo_loss_type: bco_pair`"),
        ("rl: cpo", "Nearest is `rl: simpo`"),
        ("rl: DPO", "Did you mean dpo?"),
        ("rl: yes", "found true"),
        # keys of other methods, or of none
        ("rl_beta: 0.1", "rl_beta is for `rl: orpo`, `dpo`, `ipo`, `kto` or `simpo`: set rl to one of these"),
        ("precompute_ref_log_probs: true", "is for `rl: dpo`, `ipo` or `kto`"),
        ("rl: orpo\nprecompute_ref_log_probs: true", "is for `rl: dpo`, `ipo` or `kto`"),
        ("rl: orpo\ndpo_loss_type: hinge", "dpo_loss_type is for `rl: dpo` or `ipo`"),
        (DPO + "orpo_alpha: 0.1", "orpo_alpha is for `rl: orpo`: set rl to that"),
        (DPO + "simpo_gamma: 1", "simpo_gamma is for `rl: simpo`"),
        (DPO + "kto_desirable_weight: 2", "kto_desirable_weight is for `rl: kto`"),
        (KTO + "rpo_alpha: 1", "rpo_alpha is for `rl: dpo` or `ipo`"),
        ("rl: ipo\nlabel_smoothing: 0.1", "label_smoothing is for `rl: dpo` or `simpo`"),
        # values that cannot be
        (DPO + "rl_beta: 0", "has to be greater than 0"),
        (DPO + "label_smoothing: 0.6", "has to be less than 0.5"),
        (DPO + "dpo_loss_type: kto_pair", "Write `rl: kto`"),
        (DPO + "dpo_loss_type: [sigmoid, sft]", "found a list"),
        (SIMPO + "cpo_alpha: -1", "has to be at least 0"),
        (DPO + "max_prompt_len: 0", "has to be at least 1"),
        (DPO + "max_prompt_len: 512\nsequence_len: 512", "leaves no room for an answer within sequence_len (512)"),
        # what does not go together
        (DPO + "beta: 0.1\nrl_beta: 0.1", "rl_beta and beta exclude each other"),
        (DPO + "dpo_loss_type: exo_pair", "needs label_smoothing above 0"),
        (DPO + "dpo_loss_type: robust", "without label_smoothing is sigmoid"),
        (DPO + "dpo_loss_type: hinge\nlabel_smoothing: 0.1", "with `dpo_loss_type: hinge` label_smoothing does"),
        ("rl: ipo\ndpo_loss_type: hinge", "`rl: ipo` is a loss itself"),
        (KTO + "micro_batch_size: 1\ngradient_accumulation_steps: 1", "needs several answers in a step"),
        (DPO + "sample_packing: true", "micro_batch_size counts pairs"),
        (DPO + "train_on_inputs: true", "the prompt itself is not trained"),
        # other tools' names
        (DPO + "dpo_beta: 0.1", "Write rl_beta."),
        (DPO + "loss_type: hinge", "Write dpo_loss_type"),
        (DPO + "max_prompt_length: 512", "Write max_prompt_len."),
        (DPO + "remove_unused_columns: false", "remove_unused_columns is not a key of the config. Leave it out"),
        (DPO + "ref_model: m", "the reference is the model as the run begins"),
        (DPO + "dpo_norm_loss: true", "Write `dpo_loss_type: sigmoid_norm`"),
        (SIMPO + "simpo_beta: 2", "Write rl_beta."),
        (SIMPO + "gamma: 1", "Did you mean simpo_gamma?"),
        (DPO + "trl: {beta: 0.1}", "methods that generate answers while they train"),
    ],
)
def test_what_cannot_be_said_is_one_error(report, text, words):
    (message,) = report(text, base=BASE)
    assert words in message


@pytest.mark.parametrize(
    ("text", "beta", "others"),
    [
        (DPO, 0.1, {"dpo_loss_type": "sigmoid", "label_smoothing": 0.0, "rpo_alpha": None}),
        (DPO + "beta: 0.3", 0.3, {"beta": None}),
        ("rl: ipo", 0.1, {"dpo_loss_type": "ipo"}),
        ("rl: orpo\norpo_alpha: 0.2", 0.2, {"orpo_alpha": None}),
        (SIMPO, 2.0, {"simpo_gamma": 1.0, "cpo_alpha": 0.0}),
        (SIMPO + "rl_beta: 10\nsimpo_gamma: 3", 10.0, {"simpo_gamma": 3.0}),
        (KTO, 0.1, {"kto_desirable_weight": 1.0, "kto_undesirable_weight": 1.0}),
        ("", None, {"simpo_gamma": None}),
    ],
)
def test_what_follows_from_other_keys(load, text, beta, others):
    config = load(text, base=BASE if text else BASE + "    type: alpaca\n")
    assert config.preference.rl_beta == beta
    assert {name: getattr(config.preference, name) for name in others} == others
    assert load(base=config.to_yaml()).preference == config.preference


@pytest.mark.parametrize("text", ["rl: orpo", "rl: orpo\ntrain_on_inputs: no", "rl: orpo\ntrain_on_inputs: yes", DPO])
def test_orpo_alone_trains_prompts_unless_told_not_to(load, text):
    assert load(text, base=BASE).data.train_on_inputs == ("orpo" in text and "no" not in text)


def test_each_key_says_which_methods_read_it():
    assert set(READ_BY) < set(FIELDS) and not set(READ_BY) & set(ELSEWHERE)
