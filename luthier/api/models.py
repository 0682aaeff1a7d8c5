"""`FastLanguageModel`: a model for a notebook, which is a plain transformers model, or a plain PEFT model around one.

Nothing about it is Luthier's own: TRL's trainers, `generate`, `save_pretrained` and PEFT's functions work as on any
other. Luthier's layers are there only while one of its trainers runs.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft import get_peft_model as wrap
from transformers import PreTrainedTokenizerBase

from luthier.api.devices import become, read_on_cpu, with_checked_inputs
from luthier.api.peft_models import check_lora, fill, inner_of
from luthier.api.said import say_once, speak
from luthier.api.saving import Model
from luthier.config import Config
from luthier.data.tokenizer import load_tokenizer
from luthier.errors import ConfigError, ModelError
from luthier.models.adapter_files import adapter_tensors, target_names
from luthier.models.assemble import find
from luthier.models.device import choose_device, choose_dtype
from luthier.models.load import load_model
from luthier.models.lora import add_lora, lora_layers
from luthier.models.restored import restored

log = logging.getLogger("luthier")

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

# Arguments of Unsloth's functions that do nothing here, and why.
_LOAD_NO_EFFECT = {
    "fix_tokenizer": "the tokenizer is taken as it is",
    "use_exact_model_name": "names are never replaced by others",
    "fast_inference": "luthier.load(run) generates with continuous batching; `luthier serve` serves",
    "gpu_memory_utilization": "memory is taken as it is needed",
    "float8_kv_cache": "the cache is in the compute dtype",
    "random_state": "nothing is drawn at load",
    "max_lora_rank": "any rank can be loaded",
    "disable_log_stats": "there are none",
    "unsloth_force_compile": "nothing is compiled",
    "resize_model_vocab": "the embeddings grow to the tokenizer by themselves",
    "low_cpu_mem_usage": "weights are always read straight to their device",
    "use_cache": "set by for_inference and for_training",
}
_PEFT_NO_EFFECT = {
    "max_seq_length": "it was given to from_pretrained",
    "temporary_location": "nothing is written",
    "layers_pattern": "layers are known by their place in the model",
    "task_type": "it is a causal language model",
    "inference_mode": "the adapter is made to be trained",
}


@dataclass
class Notes:
    """What the doors remember of a model: from_pretrained's arguments that only its training needs."""

    loading: Config
    run: Config | None = None  # of the last training, here or before
    max_seq_length: int | None = None
    checkpointing: bool | str | None = None


def notes_of(model: Any) -> Notes | None:
    return getattr(inner_of(model), "luthier_notes", None)


class FastLanguageModel:
    """Loads models, puts adapters on them, and switches them between training and inference."""

    @staticmethod
    def from_pretrained(
        model_name: str,
        max_seq_length: int | None = 2048,
        dtype: torch.dtype | str | None = None,
        load_in_4bit: bool = True,
        load_in_8bit: bool = False,
        full_finetuning: bool = False,
        token: str | None = None,
        device_map: Any = None,
        rope_scaling: dict[str, Any] | None = None,
        trust_remote_code: bool = False,
        use_gradient_checkpointing: bool | str | None = None,
        revision: str | None = None,
        attn_implementation: str | None = None,
        **others: Any,
    ) -> tuple[Any, PreTrainedTokenizerBase]:
        """A model and its tokenizer: from the hub, a folder, a run of Luthier's, or a saved adapter with its base.

        Args:
            model_name: name or folder. max_seq_length: longest text in training, for the trainers. dtype: None takes
                what the device computes fast. load_in_4bit: by bitsandbytes, as Unsloth's default is; write False for
                16 or 32 bits. token: of the hub, kept in this process's HF_TOKEN.

        Raises:
            LuthierError: it cannot be loaded so; says what to write instead.
        """
        speak()
        _refuse_unknown("from_pretrained", others, _LOAD_NO_EFFECT)
        if not isinstance(model_name, str | os.PathLike):
            raise ConfigError(f"model_name={model_name!r}: write the name of a model, or its folder")
        check_length(max_seq_length)
        if token:
            os.environ["HF_TOKEN"] = token
            say_once("token: kept in HF_TOKEN of this process, where the hub's client looks for it")
        if full_finetuning and (load_in_4bit or load_in_8bit):
            say_once("full_finetuning=True: quantised weights cannot be trained, so the model is loaded unquantised")
            load_in_4bit = load_in_8bit = False
        if load_in_4bit and load_in_8bit:
            load_in_4bit = False  # the default of the one must not stand against the other
        if load_in_4bit and importlib.util.find_spec("bitsandbytes") is None:
            raise ConfigError(
                "load_in_4bit needs bitsandbytes: pip install 'luthier[bitsandbytes]', or write load_in_4bit=False"
            )
        found = find(str(model_name))
        values: dict[str, Any] = {
            "base_model": found.base,
            "revision": revision or found.loading.model.revision,
            "datasets": [{"path": "none", "type": "completion"}],
            "adapter": None if full_finetuning else "lora",
            "load_in_4bit": load_in_4bit or None,
            "load_in_8bit": load_in_8bit or None,
            "trust_remote_code": trust_remote_code or None,
            "device_map": None if device_map in ("sequential", "auto", "balanced") else _plain_device(device_map),
            "rope_parameters": _rope(rope_scaling),
            "attn_implementation": attn_implementation,
            **_precision(dtype),
        }
        if found.folder is not None and (found.folder / "tokenizer_config.json").is_file():
            values["tokenizer_config"] = str(found.folder)
        config = Config.from_flat(values, origin="from_pretrained")
        device = choose_device(config.model.device_map)
        tokenizer = load_tokenizer(config)
        model = read_on_cpu(load_model(config, tokenizer, device, choose_dtype(config, device)))
        run = None
        if found.run is not None and found.is_adapter:  # in whose format it answers, as it is loaded now
            keys = {key: values[key] for key in ("base_model", "adapter", "load_in_4bit", "load_in_8bit")}
            run = found.run.replace("from_pretrained", **keys) if keys["adapter"] else None
        model.luthier_notes = Notes(config, run, max_seq_length, use_gradient_checkpointing)
        become(model, Model)
        if found.is_adapter:
            log.info("%s is an adapter: it is loaded onto its base, %s", model_name, found.base)
            model = become(PeftModel.from_pretrained(model, str(found.folder), is_trainable=True), Model)
        return model, with_checked_inputs(tokenizer)

    @staticmethod
    def get_peft_model(
        model: Any,
        r: int = 16,
        target_modules: Sequence[str] | str | None = PROJECTIONS,
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        bias: str = "none",
        layers_to_transform: Sequence[int] | int | None = None,
        use_gradient_checkpointing: bool | str | None = "unsloth",
        random_state: int = 3407,
        use_rslora: bool = False,
        use_dora: bool = False,
        modules_to_save: Sequence[str] | None = None,
        init_lora_weights: bool | str = True,
        loftq_config: Any = None,
        rank_pattern: dict[str, int] | None = None,
        alpha_pattern: dict[str, float] | None = None,
        target_parameters: Sequence[str] | None = None,
        **others: Any,
    ) -> Any:
        """The model with a new LoRA adapter on it, as a PeftModel.

        Args:
            random_state: what A is drawn from; a run with the same `seed` begins with the same adapter.

        Raises:
            LuthierError: something that cannot be trained so; says what to write instead.
        """
        _refuse_unknown("get_peft_model", others, _PEFT_NO_EFFECT)
        if isinstance(model, PeftModel):
            raise ModelError(
                "get_peft_model: the model has an adapter already, and a second one is not put on it; load the base "
                "again, or go on training with the one that it has (leave get_peft_model out)"
            )
        if loftq_config:
            raise ModelError(
                "loftq_config: LoftQ needs the weights before they are quantised; write loftq_config=None, or let the "
                'run do it: luthier.train({..., "load_in_4bit": True, "peft_init_lora_weights": "loftq"})'
            )
        layers = [layers_to_transform] if isinstance(layers_to_transform, int) else layers_to_transform
        check_lora(LoraConfig(r=r, bias=bias, init_lora_weights=init_lora_weights))
        targets = target_modules if isinstance(target_modules, str) else list(target_modules or [])
        inner = inner_of(model)
        keys = {
            "base_model": inner.config._name_or_path or "model",
            "datasets": [{"path": "none", "type": "completion"}],
            "adapter": "lora",
            "lora_r": r,
            "lora_alpha": float(lora_alpha),
            "lora_dropout": float(lora_dropout),
            "peft_use_rslora": use_rslora,
            "peft_use_dora": use_dora,
            "lora_target_modules": targets or None,
            "lora_modules_to_save": list(modules_to_save or []),
            "peft_init_lora_weights": True if init_lora_weights is False else init_lora_weights,
            "peft_layers_to_transform": None if layers is None else list(layers),
            "rank_pattern": rank_pattern or None,
            "alpha_pattern": alpha_pattern or None,
            "lora_target_parameters": list(target_parameters or []) or None,
        }
        section = Config.from_flat(keys, origin="get_peft_model").adapter
        with restored(inner, inner):
            # Our own layers find the targets, say what does not match, and draw the first A.
            every = [name for name, _ in inner.named_modules()]
            add_lora(inner, section, random_state)
            values, linears = adapter_tensors(inner, list(modules_to_save or [])), list(lora_layers(inner))
            tables = [(n, m) for n, m in inner.named_modules() if isinstance(m, torch.nn.Embedding)]
            adapted = [*linears, *(name for name, module in tables if "forward" in vars(module))]
        wrapped = wrap(
            inner,
            LoraConfig(
                task_type="CAUSAL_LM",
                r=r,
                lora_alpha=_whole(lora_alpha),
                lora_dropout=lora_dropout,
                target_modules=target_names(every, adapted) or None,
                use_rslora=use_rslora,
                use_dora=use_dora,
                modules_to_save=list(modules_to_save or []) or None,
                init_lora_weights=init_lora_weights,
                rank_pattern=dict(rank_pattern or {}),
                alpha_pattern=dict(alpha_pattern or {}),
                target_parameters=list(target_parameters or []) or None,
            ),
        )
        if init_lora_weights is not False:
            fill(wrapped, values)
        notes = notes_of(inner)
        if notes is not None:
            notes.checkpointing = use_gradient_checkpointing
        return become(wrapped, Model)

    @staticmethod
    def for_inference(model: Any) -> Any:
        """The same model in eval mode, with its cache on."""
        inner = inner_of(model)
        if any(getattr(module, "gradient_checkpointing", False) for module in inner.modules()):
            inner.gradient_checkpointing_disable()
        inner.config.use_cache = True
        return model.eval()

    @staticmethod
    def for_training(model: Any, use_gradient_checkpointing: bool | str | None = None) -> Any:
        """The same model in training mode."""
        notes = notes_of(model)
        if notes is not None and use_gradient_checkpointing is not None:
            notes.checkpointing = use_gradient_checkpointing
        return model.train()


def check_length(max_seq_length: Any) -> None:
    """Raises ConfigError for what is no length of a text in tokens."""
    if max_seq_length is not None and (not isinstance(max_seq_length, int) or max_seq_length < 1):
        raise ConfigError(f"max_seq_length={max_seq_length!r}: write a number of tokens, such as 2048, or None")


def _whole(alpha: float) -> Any:
    """PEFT's field is an int, where it is one."""
    return int(alpha) if float(alpha).is_integer() else alpha


def _refuse_unknown(where: str, given: dict[str, Any], without_effect: dict[str, str]) -> None:
    for name, value in given.items():
        if name in without_effect:
            if value not in (None, False):
                say_once(f"{where}: {name} has no effect here: {without_effect[name]}")
        elif value not in (None, False):
            raise ConfigError(f"{where}: {name}={value!r} is not built here; leave it out (docs/porting.md lists all)")


def _precision(dtype: torch.dtype | str | None) -> dict[str, Any]:
    names: dict[Any, dict[str, Any]] = {
        "None": {},
        "auto": {},
        "float32": {"bf16": False},
        "bfloat16": {"bf16": True},
        "float16": {"fp16": True},
    }
    name = str(dtype).removeprefix("torch.")
    if name not in names:
        raise ConfigError(
            f"dtype={dtype!r}: write None (what the device computes fast), torch.float32 or torch.bfloat16"
        )
    return names[name]


def _plain_device(device_map: Any) -> Any:
    if isinstance(device_map, dict):
        return {str(key): value if isinstance(value, int) else str(value) for key, value in device_map.items()}
    return None if device_map is None else f"cuda:{device_map}" if isinstance(device_map, int) else str(device_map)


def _rope(scaling: dict[str, Any] | None) -> dict[str, Any] | None:
    if not scaling:
        return None
    return {("rope_type" if key == "type" else key): value for key, value in scaling.items()}


def folder_of_tokenizer(model: Any) -> str:
    """Where a model's tokenizer is, for a trainer that was given none."""
    name = inner_of(model).config._name_or_path
    if not name or (not Path(name).exists() and name.startswith(("/", "."))):
        raise ModelError("the trainer was given no tokenizer: write SFTTrainer(..., processing_class=tokenizer)")
    return str(name)
