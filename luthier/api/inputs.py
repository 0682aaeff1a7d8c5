"""What a trainer is given, other than arguments and rows: a model, a tokenizer, and what it does not take."""

from __future__ import annotations

import logging
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from transformers import AutoTokenizer

from luthier.api.devices import read_on_cpu
from luthier.api.models import FastLanguageModel, folder_of_tokenizer
from luthier.api.peft_models import check_lora, inner_of
from luthier.api.said import say_once
from luthier.config import Config
from luthier.errors import ConfigError, ModelError
from luthier.models.load import embeddings_of, read_model_config

log = logging.getLogger("luthier")

# Collators that pad, which nothing here does; others change what is learnt.
_PADDING = (
    "DataCollatorForSeq2Seq",
    "DataCollatorForLanguageModeling",
    "DataCollatorWithPadding",
    "DefaultDataCollator",
)
_OTHER_WORDS = {
    "compute_metrics": "an evaluation is its loss and what the method logs; `luthier evaluate` measures more",
    "compute_loss_func": "the loss is the trainer's own",
    "preprocess_logits_for_metrics": "logits are never held",
    "optimizer_cls_and_kwargs": "write optim=... in the arguments",
    "model_init": "give the model itself",
    "reward_funcs": "this is no trainer with rewards",
}


def check_others(name: str, others: dict[str, Any], collator: Any, optimizers: tuple[Any, Any]) -> None:
    if collator is not None:
        kind = type(collator).__name__
        if kind not in _PADDING or getattr(collator, "mlm", False):
            raise ConfigError(
                f"{name}: data_collator={kind}: what is trained of a row is said by its columns: give `prompt` and "
                "`completion`, or `messages` with assistant_only_loss=True"
            )
        say_once(f"{name}: data_collator has no effect here: no padding is ever computed")
    if any(one is not None for one in optimizers):
        raise ConfigError(f"{name}: optimizers: write optim=... and lr_scheduler_type=... in the arguments instead")
    for key, value in others.items():
        if key == "quantization_config" or value is None:
            continue
        if key in ("dataset_kwargs", "dataset_batch_size", "eval_packing", "num_of_sequences", "chars_per_token"):
            say_once(f"{name}: {key} has no effect here: rows are tokenised and packed as the config says")
        elif key in _OTHER_WORDS:
            raise ConfigError(f"{name}: {key} is not taken: {_OTHER_WORDS[key]}")
        else:
            raise ConfigError(f"{name}: there is no argument {key}; settings of training go into args=SFTConfig(...)")


def tokenizer_of(name: str, processing_class: Any, tokenizer: Any, model: Any) -> Any:
    if processing_class is not None and tokenizer is not None and processing_class is not tokenizer:
        raise ConfigError(f"{name}: tokenizer and processing_class are two names of one argument; give one of them")
    given = processing_class if processing_class is not None else tokenizer
    if given is None:
        given = AutoTokenizer.from_pretrained(model if isinstance(model, str) else folder_of_tokenizer(model))
    if hasattr(given, "tokenizer") and not hasattr(given, "convert_tokens_to_ids"):
        say_once(f"{name}: of {type(given).__name__} the tokenizer is used; only text is trained")
        return given.tokenizer
    return given


def model_of(model: Any, args: Any, peft_config: Any, quantization: Any) -> Any:
    if isinstance(model, str):
        settings = dict(getattr(args, "model_init_kwargs", None) or {})
        model, _ = FastLanguageModel.from_pretrained(
            model,
            max_seq_length=None,
            dtype=settings.pop("dtype", settings.pop("torch_dtype", None)),
            load_in_4bit=bool(getattr(quantization, "load_in_4bit", False)),
            load_in_8bit=bool(getattr(quantization, "load_in_8bit", False)),
            full_finetuning=peft_config is None,
            **settings,
        )
    elif quantization is not None:
        raise ConfigError("quantization_config: the model is loaded already; give it to from_pretrained")
    read_on_cpu(inner_of(model))
    if peft_config is None:
        return model
    check_lora(peft_config)
    if isinstance(model, PeftModel):
        raise ModelError(
            "peft_config: the model has an adapter already (get_peft_model); give the trainer the one or the other"
        )
    return get_peft_model(model, peft_config)


def check_place(inner: Any) -> None:
    """Raises ModelError for a model that lies on several devices, or partly on a disk."""
    places = sorted({str(p.device) for p in inner.parameters()})
    if len(places) > 1:
        raise ModelError(
            f"the model is spread over {', '.join(places)}, and a run has it on one device: load it with "
            'device_map={"": 0}, or leave device_map out'
        )


def say_new_tokens(model: Any, config: Config) -> None:
    """Warn of embeddings that the checkpoint has not, where nothing saves them with the run."""
    inner = inner_of(model)
    rows = int(embeddings_of(inner).weight.shape[0])
    known = read_model_config(config.model).get_text_config(decoder=True).vocab_size
    saved = config.adapter.adapter is None or config.adapter.lora_modules_to_save
    if rows > known and not saved:
        log.warning(
            "the model has embeddings for %d tokens more than %s, which the run's adapter does not hold: write "
            'modules_to_save=["embed_tokens", "lm_head"] to train and keep them; model.save_pretrained(...) keeps them '
            "as they are",
            rows - known,
            config.model.base_model,
        )


def stored_as(inner: Any) -> dict[str, Any]:
    """The keys for a base that is quantised in memory."""
    found = getattr(inner.config, "quantization_config", None)
    if found is None or getattr(inner, "quantization_method", None) is None:
        return {}
    values = found if isinstance(found, dict) else found.to_dict()
    if values.get("load_in_8bit"):
        return {"load_in_8bit": True}
    if not values.get("load_in_4bit"):
        raise ModelError(
            f"the model is quantised by {values.get('quant_method')}, and Luthier trains on bitsandbytes' formats: "
            "load it with BitsAndBytesConfig(load_in_4bit=True)"
        )
    return {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": values.get("bnb_4bit_quant_type", "fp4"),
        "bnb_4bit_use_double_quant": bool(values.get("bnb_4bit_use_double_quant", False)),
    }


def computes_in(inner: Any) -> torch.dtype | None:
    found = getattr(inner.config, "quantization_config", None)
    name = getattr(found, "bnb_4bit_compute_dtype", None)
    return name if isinstance(name, torch.dtype) else None


def trained_whole(inner: Any) -> dict[str, Any]:
    """Full fine-tuning: all parameters, or those that the notebook left to be trained."""
    names = [name for name, p in inner.named_parameters() if p.requires_grad]
    every = [name for name, p in inner.named_parameters() if p.is_floating_point()]
    if not names:
        raise ModelError(
            "no parameter of the model trains: put an adapter on it (FastLanguageModel.get_peft_model, or "
            "peft_config=LoraConfig(...))"
        )
    if len(names) == len(every):
        return {}
    return {"unfrozen_parameters": [f"^{name.replace('.', '[.]')}$" for name in names]}
