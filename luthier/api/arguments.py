"""`SFTConfig`, `ORPOConfig` and their kin: TRL's names and defaults on transformers' own TrainingArguments.

Names that transformers and TRL have given up since (`evaluation_strategy`, `max_seq_length`, `overwrite_output_dir`)
are taken as what they are called now. A precision that this machine lacks is turned off with one message, before
transformers could refuse the whole of it.
"""

from __future__ import annotations

import dataclasses
import difflib
import logging
from dataclasses import dataclass
from typing import Any

import torch
import transformers

from luthier.api.devices import is_bfloat16_supported
from luthier.api.said import say_once
from luthier.errors import ConfigError

# What an argument was called before.
_OLD_NAMES = {
    "evaluation_strategy": "eval_strategy",
    "no_cuda": "use_cpu",
    "max_seq_length": "max_length",
    "num_of_sequences": None,
    "logging_dir": None,
    "chars_per_token": None,
    "group_by_length": None,
    "save_safetensors": None,
    "fp16_opt_level": None,
    "half_precision_backend": None,
    "dataloader_pin_memory_device": None,
}
_NO_LONGER = "nothing is done with it any more"
_WHY_DROPPED = {
    "group_by_length": "documents are never padded, so that their lengths need not be alike",
    "save_safetensors": "files are always safetensors",
    "logging_dir": "what trackers write is in output_dir/trackers",
}


@dataclass
class _Plain(transformers.TrainingArguments):
    """What transformers once had.

    Attributes:
        overwrite_output_dir: delete the run that is in output_dir; otherwise a new run gets a folder beside it.
    """

    overwrite_output_dir: bool = False
    warmup_ratio: float | None = None


@dataclass
class _Own(_Plain):
    """What TRL's arguments have in common."""

    max_length: int | None = None
    dataset_num_proc: int | None = None
    logging_steps: float = 10
    learning_rate: float = 2e-5
    disable_dropout: bool = False
    trust_remote_code: bool = False
    model_init_kwargs: dict[str, Any] | None = None
    pad_token: str | None = None
    pad_to_multiple_of: Any = "auto"
    padding_free: bool = False
    activation_offloading: bool = False
    truncation_mode: str = "keep_start"
    router_aux_loss_coef: float | None = None


@dataclass
class _SFT(_Own):
    dataset_text_field: str = "text"
    dataset_kwargs: dict[str, Any] | None = None
    packing: bool = False
    packing_strategy: str = "bfd"
    eval_packing: bool | None = None
    completion_only_loss: bool | None = None
    assistant_only_loss: bool = False
    loss_type: str = "nll"
    chat_template_path: str | None = None
    eos_token: str | None = None
    shuffle_dataset: bool = False


@dataclass
class _Pairs(_Own):
    learning_rate: float = 1e-6
    beta: float = 0.1
    disable_dropout: bool = True
    max_prompt_length: int | None = None
    max_completion_length: int | None = None
    label_pad_token_id: int = -100
    padding_value: int | None = None
    generate_during_eval: bool = False
    is_encoder_decoder: bool | None = None


@dataclass
class _ORPO(_Pairs):
    """Odds-ratio preference optimisation."""


@dataclass
class _DPO(_Pairs):
    loss_type: Any = "sigmoid"
    loss_weights: list[float] | None = None
    label_smoothing: float = 0.0
    rpo_alpha: float | None = None
    precompute_ref_log_probs: bool = False
    precompute_ref_batch_size: int | None = None
    reference_free: bool = False
    f_divergence_type: str = "reverse_kl"
    f_alpha_divergence_coef: float = 0.5
    use_weighting: bool = False
    discopop_tau: float = 0.05
    ld_alpha: float | None = None
    sync_ref_model: bool = False
    ref_model_mixup_alpha: float = 0.6
    ref_model_sync_steps: int = 512
    model_adapter_name: str | None = None
    ref_adapter_name: str | None = None
    force_use_ref_model: bool = False


@dataclass
class _KTO(_Pairs):
    loss_type: str = "kto"
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    precompute_ref_log_probs: bool = False
    precompute_ref_batch_size: int | None = None
    sync_ref_model: bool = False
    ref_model_mixup_alpha: float = 0.6
    ref_model_sync_steps: int = 512


@dataclass
class _CPO(_Pairs):
    loss_type: str = "sigmoid"
    label_smoothing: float = 0.0
    cpo_alpha: float = 1.0
    simpo_gamma: float = 0.5
    alpha: float = 0.0


def _accepted(cls: Any, values: dict[str, Any]) -> dict[str, Any]:
    """Arguments by today's names, without a precision that would not be computed in.

    Raises:
        ConfigError: an argument that there is not; names the nearest.
    """
    known = {field.name for field in dataclasses.fields(cls)}
    found: dict[str, Any] = {}
    for name, value in values.items():
        now = _OLD_NAMES.get(name, name)
        if now is None:
            if value not in (None, False):
                say_once(f"{cls.__name__}: {name} has no effect here: {_WHY_DROPPED.get(name, _NO_LONGER)}")
        elif now in known:
            found[now] = value
        else:
            near = difflib.get_close_matches(name, sorted(known), 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(f"{cls.__name__}: there is no argument {name}{hint}")
    return _possible(cls.__name__, found)


def _possible(where: str, found: dict[str, Any]) -> dict[str, Any]:
    for name, there in (("bf16", is_bfloat16_supported()), ("tf32", torch.cuda.is_available())):
        if found.get(name) and not there and not (name == "bf16" and found.get("use_cpu")):
            say_once(
                f"{where}: {name}=True: this machine has no fast {name}, and the run computes in fp32 or fp16 instead; "
                f"write {name}=False, or {name}={'is_bfloat16_supported()' if name == 'bf16' else 'None'}",
                logging.WARNING,
            )
            found[name] = None if name == "tf32" else False
    return found


class _Door:
    """Before a class of arguments: takes older names, and says what this machine cannot do."""

    def __init__(self, output_dir: str | None = None, **values: Any) -> None:
        if output_dir is not None:
            values["output_dir"] = output_dir
        self.given = frozenset(_OLD_NAMES.get(name) or name for name in values)
        super().__init__(**_accepted(type(self), values))


class SFTConfig(_Door, _SFT):
    """Arguments of `SFTTrainer`."""


class ORPOConfig(_Door, _ORPO):
    """Arguments of `ORPOTrainer`."""


class DPOConfig(_Door, _DPO):
    """Arguments of `DPOTrainer`."""


class KTOConfig(_Door, _KTO):
    """Arguments of `KTOTrainer`."""


class CPOConfig(_Door, _CPO):
    """Arguments of `CPOTrainer`."""


class TrainingArguments(_Door, _Plain):
    """transformers' arguments, for notebooks that ask for a precision which this machine has not."""
