"""The keys that turn a run into preference tuning, and which of them each method reads.

    orpo    Hong et al. 2024     no reference: NLL of the chosen answer, and the log odds of chosen against rejected
    dpo     Rafailov et al. 2023 log-probs against a reference, chosen less rejected; `dpo_loss_type` names its kin
    ipo     Azar et al. 2023     `rl: dpo` with `dpo_loss_type: ipo`
    kto     Ethayarajh et al. 2024, unpaired: each answer is desirable or not
    simpo   Meng et al. 2024     no reference: mean log-probs, with a margin
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from luthier.config.base import Section

Method = Literal["orpo", "dpo", "ipo", "kto", "simpo"]
DPOLoss = Literal[
    "sigmoid",
    "hinge",
    "ipo",
    "robust",
    "exo_pair",
    "nca_pair",
    "bco_pair",
    "sppo_hard",
    "apo_zero",
    "apo_down",
    "discopop",
    "sigmoid_norm",
]


class PreferenceConfig(Section):
    """Learning from preferences instead of from answers alone."""

    rl: Method | None = None
    """Method: `orpo`, `dpo`, `ipo`, `kto` or `simpo`. Unset: supervised fine-tuning. Rows are then pairs of a chosen
    and a rejected answer, or for `kto` answers that are labelled desirable or not."""
    rl_beta: Annotated[float | None, Field(gt=0)] = None
    """Strength of the preference: the inverse of how far the model may go from the reference (`dpo`, `ipo`, `kto`),
    the weight of the odds ratio (`orpo`), the scale of the rewards (`simpo`). Default: 0.1; for `simpo` 2."""
    orpo_alpha: Annotated[float | None, Field(gt=0)] = None
    """Another name of `rl_beta` for `orpo`: the weight of the odds ratio, the paper's lambda."""
    beta: Annotated[float | None, Field(gt=0)] = None
    """Another name of `rl_beta`."""
    dpo_loss_type: DPOLoss = "sigmoid"
    """Loss of `dpo`, by TRL's names: `sigmoid` is the paper's; `hinge`, `ipo`, `robust`, `exo_pair`, `nca_pair`,
    `bco_pair`, `sppo_hard`, `apo_zero`, `apo_down`, `discopop`, `sigmoid_norm` (mean log-probs)."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Share of pairs that are taken to be labelled the wrong way round (`dpo` with `sigmoid`, `robust`, `exo_pair`;
    `simpo`)."""
    rpo_alpha: Annotated[float | None, Field(gt=0)] = None
    """Weight of the negative log-likelihood of the chosen answers, a mean over tokens, added to the loss of `dpo`."""
    simpo_gamma: Annotated[float | None, Field(ge=0)] = None
    """Margin between the rewards of chosen and rejected that `simpo` asks for. Default: 1."""
    cpo_alpha: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the negative log-likelihood of the chosen answers, a mean over tokens, added to the loss of `simpo`;
    the paper has none."""
    kto_desirable_weight: Annotated[float, Field(gt=0)] = 1.0
    """Weight of the desirable answers in the loss of `kto`."""
    kto_undesirable_weight: Annotated[float, Field(gt=0)] = 1.0
    """Weight of the undesirable answers in the loss of `kto`."""
    precompute_ref_log_probs: bool = False
    """Compute the reference's log-probs of all training data once, before the first step, and keep them beside the
    tokenised data; otherwise in each step, for its own rows. Pays from the second epoch on."""
    max_prompt_len: Annotated[int | None, Field(ge=1)] = None
    """Longest prompt, in tokens. What happens to longer ones is said by `excess_length_strategy`; truncated are they
    at their beginning. Default: whatever `sequence_len` has room for."""


# What each key goes with; with other methods it does nothing.
READ_BY: dict[str, tuple[Method, ...]] = {
    "rl_beta": ("orpo", "dpo", "ipo", "kto", "simpo"),
    "beta": ("orpo", "dpo", "ipo", "kto", "simpo"),
    "orpo_alpha": ("orpo",),
    "dpo_loss_type": ("dpo", "ipo"),
    "label_smoothing": ("dpo", "simpo"),
    "rpo_alpha": ("dpo", "ipo"),
    "simpo_gamma": ("simpo",),
    "cpo_alpha": ("simpo",),
    "kto_desirable_weight": ("kto",),
    "kto_undesirable_weight": ("kto",),
    "precompute_ref_log_probs": ("dpo", "ipo", "kto"),
    "max_prompt_len": ("orpo", "dpo", "ipo", "kto", "simpo"),
}

# Methods that compare with no reference model.
REFERENCE_FREE = ("orpo", "simpo")


def has_reference(rl: str | None) -> bool:
    """Whether a run of this method compares its model with a reference."""
    return rl is not None and rl not in REFERENCE_FREE


def asks_reference_in_steps(section: PreferenceConfig) -> bool:
    """Whether the reference is asked in the run's steps, and not before them only. For `kto` it is in any case: which
    answers stand behind which other prompts, the step decides."""
    return has_reference(section.rl) and (section.rl == "kto" or not section.precompute_ref_log_probs)


def unit_of(rl: str | None) -> str:
    """What a row of a run's data is: documents, pairs (of answers), or answers."""
    return {None: "documents", "kto": "answers"}.get(rl, "pairs")


_SMOOTHED = ("sigmoid", "robust", "exo_pair")
_BETA = {"simpo": 2.0}
# Of `rl_beta`, which has their value once a config is loaded.
OTHER_NAMES = ("orpo_alpha", "beta")


def flaws(c: Mapping[str, Any], written: Collection[str]) -> Iterator[tuple[str, str]]:
    """What the keys of preference tuning cannot say together: (key, message)."""
    rl = c["rl"]
    if rl is None:
        return
    if c["sample_packing"]:
        yield (
            "sample_packing",
            f"with `rl: {rl}` micro_batch_size counts {'answers' if rl == 'kto' else 'pairs'}, and no padding is ever "
            "computed: leave out sample_packing, or rl.",
        )
    if c["train_on_inputs"] and rl != "orpo" and "train_on_inputs" in written:
        yield (
            "train_on_inputs",
            f"`rl: {rl}` compares answers to the same prompt, and the prompt itself is not trained: leave out "
            "train_on_inputs, or change rl.",
        )
    if rl == "ipo" and "dpo_loss_type" in written and c["dpo_loss_type"] != "ipo":
        yield "dpo_loss_type", "`rl: ipo` is a loss itself: leave out dpo_loss_type, or write `rl: dpo`."
    if rl == "dpo" and c["label_smoothing"] and c["dpo_loss_type"] not in _SMOOTHED:
        yield (
            "label_smoothing",
            f"with `dpo_loss_type: {c['dpo_loss_type']}` label_smoothing does nothing; it is for "
            f"{', '.join(_SMOOTHED[:-1])} and {_SMOOTHED[-1]}: change dpo_loss_type, or leave label_smoothing out.",
        )
    if rl == "dpo" and c["dpo_loss_type"] == "robust" and not c["label_smoothing"]:
        yield (
            "dpo_loss_type",
            "`dpo_loss_type: robust` without label_smoothing is sigmoid: set label_smoothing to the share of pairs "
            "that are labelled the wrong way round, or leave dpo_loss_type out.",
        )
    if rl == "dpo" and c["dpo_loss_type"] == "exo_pair" and not c["label_smoothing"]:
        yield (
            "dpo_loss_type",
            "`dpo_loss_type: exo_pair` needs label_smoothing above 0, such as 0.001: its target has that much of the "
            "rejected answer, and the logarithm of it.",
        )
    if c["max_prompt_len"] is not None and c["max_prompt_len"] >= c["sequence_len"]:
        yield (
            "max_prompt_len",
            f"max_prompt_len ({c['max_prompt_len']}) leaves no room for an answer within sequence_len "
            f"({c['sequence_len']}): make it smaller, or leave it out.",
        )
    if rl == "kto" and c["micro_batch_size"] * c["gradient_accumulation_steps"] == 1:
        yield (
            "micro_batch_size",
            "`rl: kto` needs several answers in a step: each is paired with another's prompt to see how far the model "
            "is from its reference. Raise micro_batch_size or gradient_accumulation_steps.",
        )


ONE_OF = (("rl_beta", "beta"), ("rl_beta", "orpo_alpha"), ("orpo_alpha", "beta"))


def derived(c: Mapping[str, Any], written: Collection[str]) -> dict[str, tuple[Any, str]]:
    """Values that follow from others, each with the reason."""
    rl = c["rl"]
    values: dict[str, tuple[Any, str]] = {}
    if rl is None:
        return values
    for other in OTHER_NAMES:
        if c[other] is not None:
            values["rl_beta"], values[other] = (c[other], f"from {other}"), (None, "rl_beta has it")
    if c["rl_beta"] is None and "rl_beta" not in values:
        values["rl_beta"] = (_BETA.get(rl, 0.1), f"usual with {rl}")
    if rl == "simpo" and c["simpo_gamma"] is None:
        values["simpo_gamma"] = (1.0, "half of the usual beta")
    if rl == "ipo":
        values["dpo_loss_type"] = ("ipo", "rl is ipo")
    if rl == "orpo" and "train_on_inputs" not in written:
        values["train_on_inputs"] = (True, "orpo's likelihood is that of prompt and answer; false: of the answer alone")
    return values
