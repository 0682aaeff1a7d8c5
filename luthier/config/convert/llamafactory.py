"""A YAML of LLaMA-Factory's as a config of ours, with the datasets that its `dataset_info.json` names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from luthier.config.convert import arguments
from luthier.config.convert import llamafactory_keys as keys
from luthier.config.convert.conversion import Conversion
from luthier.config.convert.dataset_info import Rows, datasets
from luthier.config.yaml_source import Source, parse_scalar

_SIGNS = ("model_name_or_path", "finetuning_type", "cutoff_len", "dataset_dir")


def is_theirs(source: Source) -> bool:
    """Whether a file has keys that only LLaMA-Factory's configs have."""
    return "base_model" not in source.values and any(key in source.values for key in _SIGNS)


def convert(source: Source) -> Conversion:
    """All keys of a file, each in its list, and LLaMA-Factory's defaults where ours are others."""
    into = Conversion(source, keys.TOOL)
    reader = _LlamaFactory(into, source)
    # What the method is decides what other keys mean.
    order = sorted(source.values, key=("stage", "pref_loss", "finetuning_type").count, reverse=True)
    rest = arguments.convert(into, {key: source.values[key] for key in order if key not in keys.ALL})
    for key in order:
        if key in keys.ALL:
            reader.key(key, source.values[key])
        elif key in rest:
            into.unknown(key, keys.ALL | arguments.KNOWN, "LLaMA-Factory's")
    reader.rows()
    reader.defaults()
    into.drop_idle()
    return into


class _LlamaFactory:
    def __init__(self, into: Conversion, source: Source) -> None:
        self.into = into
        self.folder = Path(source.name).parent
        self.given = {key: value for key, value in source.values.items() if value not in (None, [], {})}
        self.stage = self.given.get("stage", "sft")

    def key(self, key: str, value: Any) -> None:
        """One key of the file that is LLaMA-Factory's own."""
        own = getattr(self, f"_{key}", None)
        if value is None or value in ([], {}):
            self.into.no_effect(key)
        elif own is not None:
            own(key, value)
        elif key in keys.RENAMED:
            self.into.carry(key, keys.RENAMED[key], value)
        elif key in keys.NO_EFFECT:
            self.into.no_effect(key, keys.NO_EFFECT[key])
        elif key in keys.REFUSED:
            self.into.refuse(key, value, keys.REFUSED[key])

    # --- the method ---

    def _stage(self, key: str, value: Any) -> None:
        if value in ("sft", "pt"):
            self.into.carried(key, "without rl" if value == "sft" else "rows of `type: completion`")
        elif value == "kto":
            self.into.carry(key, "rl", value)
        elif value == "dpo":
            loss = self.given.get("pref_loss", "sigmoid")
            self.into.carry(key, "rl", loss if loss in ("orpo", "simpo") else "dpo")
        else:
            self.into.unsupported(key, f"{value}: sft, pt, dpo and kto are built here.", essential=True)

    def _pref_loss(self, key: str, value: Any) -> None:
        if value in ("orpo", "simpo"):
            self.into.carried(key, f"rl: {value}")
        elif value == "sigmoid" or self.stage != "dpo":
            self.into.no_effect(key, "it is the loss of the method")
        else:
            self.into.carry(key, "dpo_loss_type", value)

    def _pref_ftx(self, key: str, value: Any) -> None:
        rl = self.into.values.get("rl")
        if not value:
            self.into.no_effect(key)
        elif rl in ("dpo", "simpo"):
            self.into.carry(key, "rpo_alpha" if rl == "dpo" else "cpo_alpha", value)
        else:
            self.into.unsupported(key, "orpo has the likelihood of the chosen answers in its loss already.")

    def _finetuning_type(self, key: str, value: Any) -> None:
        if value == "lora":
            self.into.carry(key, "adapter", "lora")
        elif value == "full":
            self.into.carried(key, "no adapter")
        else:
            self.into.unsupported(
                key, f"{value}: lora and full are built here; unfrozen_parameters trains parts.", essential=True
            )

    def _lora_target(self, key: str, value: Any) -> None:
        if value == "all":
            self.into.carry(key, "lora_target_linear", True)
        else:
            self.into.carry(key, "lora_target_modules", _split(value))

    def _additional_target(self, key: str, value: Any) -> None:
        self.into.carry(key, "lora_modules_to_save", _split(value))

    def _pissa_init(self, key: str, value: Any) -> None:
        if value:
            turns = self.given.get("pissa_iter", 16)
            self.into.carry(key, "peft_init_lora_weights", "pissa" if turns == -1 else f"pissa_niter_{turns}")
        else:
            self.into.no_effect(key)

    def _adapter_name_or_path(self, key: str, value: Any) -> None:
        names = _split(value)
        if len(names) == 1:
            self.into.carry(key, "lora_model_dir", names[0])
        else:
            self.into.unsupported(key, "several adapters: merge all but the last by `luthier merge-lora`.")

    # --- the model ---

    def _quantization_bit(self, key: str, value: Any) -> None:
        if value in (4, 8):
            self.into.carry(key, f"load_in_{value}bit", True)
        else:
            self.into.unsupported(key, f"{value}: bases are quantised to 4 or 8 bits.")

    def _quantization_method(self, key: str, value: Any) -> None:
        if str(value).lower() in ("bnb", "bitsandbytes"):
            self.into.no_effect(key, "bases are quantised by bitsandbytes")
        else:
            self.into.unsupported(key, f"{value}: bases are quantised by bitsandbytes.")

    def _flash_attn(self, key: str, value: Any) -> None:
        names = {"disabled": "eager", "False": "eager", "sdpa": "sdpa", "fa2": "flash_attention_2"}
        names["fa3"] = "flash_attention_3"
        if value == "auto":
            self.into.no_effect(key, "the fastest attention is taken as it is")
        elif str(value) in names:
            self.into.carry(key, "attn_implementation", names[str(value)])
        else:
            self.into.unsupported(key, f"{value}: write attn_implementation.")

    def _add_tokens(self, key: str, value: Any) -> None:
        self.into.carry(key, "tokens", _split(value))

    def _add_special_tokens(self, key: str, value: Any) -> None:
        found = dict(self.into.values.get("special_tokens", {}))
        self.into.carry(key, "special_tokens", found | {"additional_special_tokens": _split(value)})

    def _init_special_tokens(self, key: str, value: Any) -> None:
        if value == "noise_init":
            self.into.no_effect(key, "rows of added tokens begin near the mean of the others")
        else:
            self.into.unsupported(key, f"{value}: rows of added tokens begin near the mean of the others.")

    def _use_unsloth_gc(self, key: str, value: Any) -> None:
        if value:
            self.into.carry(key, "gradient_checkpointing", "offload")
        else:
            self.into.no_effect(key)

    def _disable_gradient_checkpointing(self, key: str, value: Any) -> None:
        if value:
            self.into.carry(key, "gradient_checkpointing", False)
        else:
            self.into.no_effect(key)

    def _pure_bf16(self, key: str, value: Any) -> None:
        if value:
            self.into.carry(key, "bf16", True)
        else:
            self.into.no_effect(key)

    # --- the steps ---

    def _use_muon(self, key: str, value: Any) -> None:
        if value:
            self.into.carry(key, "optimizer", "muon")
        else:
            self.into.no_effect(key)

    def _disable_shuffling(self, key: str, value: Any) -> None:
        if value:
            self.into.carry(key, "shuffle", False)
        else:
            self.into.no_effect(key)

    def _early_stopping_steps(self, key: str, value: Any) -> None:
        self.into.carry(key, "early_stopping_patience", value)

    # --- the data ---

    def _packing(self, key: str, value: Any) -> None:
        remark = "" if self.given.get("neat_packing") or not value else "documents of a row never see each other here"
        self.into.carry(key, "sample_packing", value, remark)

    def _neat_packing(self, key: str, value: Any) -> None:
        if value:
            self.into.carry(key, "sample_packing", True)
        else:
            self.into.no_effect(key)

    def _mix_strategy(self, key: str, value: Any) -> None:
        stopping = {"interleave_under": "first_exhausted", "interleave_over": "all_exhausted"}
        streamed, shuffled = self.given.get("streaming"), not self.given.get("disable_shuffling")
        if value == "concat":
            self.into.no_effect(key, "datasets are put together whole")
        elif str(value) in stopping:
            self.into.carry(key, "mix_strategy", "interleave", "its parts are exact, where there they are drawn by lot")
            self.into.also("mix_stopping", stopping[str(value)], key)
        elif value == "interleave_once" and shuffled and not streamed:
            self.into.no_effect(key, "an epoch has every row once, in a random order")
        else:
            self.into.unsupported(key, f"{value}: write interleave_under or interleave_over, or concat.")

    def _interleave_probs(self, key: str, value: Any) -> None:
        """Weights of the datasets, which `rows` reads."""
        if self.given.get("mix_strategy") not in ("interleave_under", "interleave_over"):
            self.into.no_effect(key, "it belongs to the strategies that interleave")

    def _streaming(self, key: str, value: Any) -> None:
        if value:
            self.into.carry(key, "streaming", value)
        else:
            self.into.no_effect(key)

    def _buffer_size(self, key: str, value: Any) -> None:
        if self.given.get("streaming"):
            self.into.carry(key, "shuffle_buffer_size", value)
        else:
            self.into.no_effect(key, "it belongs to streaming")

    def _enable_thinking(self, key: str, value: Any) -> None:
        if value:
            self.into.no_effect(key, "it is the chat template's own default")
        else:
            self.into.carry(key, "chat_template_kwargs", {"enable_thinking": False})

    def _preserve_thinking(self, key: str, value: Any) -> None:
        self.into.refuse(key, value, "the chat template says what is kept of earlier turns.")

    def _template(self, key: str, value: Any) -> None:
        if str(value) in keys.TEMPLATES:
            self.into.carry(key, "chat_template", keys.TEMPLATES[str(value)].chat)
        else:
            self.into.carry(key, "chat_template", "tokenizer_default", "the model's own, which that template follows")
            self.into.check("chat_template", f"template {value} is taken to be the model's own")
        if self.stage == "pt":
            self.into.values.pop("chat_template", None)

    def _default_system(self, key: str, value: Any) -> None:
        self.into.carried(key, "the system_prompt of rows without conversations")

    def _max_samples(self, key: str, value: Any) -> None:
        self.into.carried(key, f"path: ...#{value}")

    def _dataset(self, key: str, value: Any) -> None:
        """Read by `rows`, when all else is known."""

    _eval_dataset = _dataset_dir = _dataset

    def rows(self) -> None:
        """The datasets, by their names in `dataset_info.json`."""
        how = Rows(
            stage=self.stage,
            rl=self.into.values.get("rl"),
            template=self.given.get("template"),
            system=self.given.get("default_system"),
            max_samples=self.given.get("max_samples"),
        )
        for key, target in (("dataset", "datasets"), ("eval_dataset", "test_datasets")):
            if key in self.given:
                names = _split(self.given[key])
                datasets(self.into, key, target, names, self.given.get("dataset_dir"), self.folder, how)
        self._weigh()
        if "dataset_dir" in self.given:
            self.into.carried("dataset_dir", "it is in the paths of the datasets")
        entries = [*self.into.values.get("datasets", []), *self.into.values.get("test_datasets", [])]
        if not any(str(entry.get("type")).startswith("chat_template") for entry in entries):
            self.into.values.pop("chat_template", None)
        known = keys.TEMPLATES.get(str(self.given.get("template")))
        if known is not None and known.ends and self.stage != "pt" and entries:
            tokens = {"eos_token": known.ends} | self.into.values.get("special_tokens", {})
            self.into.also("special_tokens", tokens, "template")

    def _weigh(self) -> None:
        """`interleave_probs` as the weights of the datasets."""
        key = "interleave_probs"
        if key not in self.given or self.into.values.get("mix_strategy") != "interleave":
            return
        entries = self.into.values.get("datasets", [])
        parts = [parse_scalar(part) for part in _split(self.given[key])]
        if len(parts) != len(entries):
            self.into.unsupported(key, f"there are {len(parts)} of them, and {len(entries)} datasets.")
        elif not all(isinstance(part, int | float) and part > 0 for part in parts):
            self.into.unsupported(key, "write a number above 0 for each dataset.")
        else:
            for entry, part in zip(entries, parts, strict=True):
                entry["weight"] = part
            self.into.carried(key, "weight, of each dataset")

    def defaults(self) -> None:
        """What LLaMA-Factory does where the file says nothing."""
        into = self.into
        if "finetuning_type" not in self.given:
            into.default("adapter", "lora")
        if into.values.get("adapter"):
            targets = into.has("lora_target_modules", "lora_model_dir")
            for key, (value, remark) in keys.OF_LORA.items():
                if not (targets and key == "lora_target_linear"):
                    into.default(key, value, remark)
            into.default("lora_alpha", into.values["lora_r"] * 2, "twice lora_rank")
        if into.values.get("streaming"):
            for key, (value, remark) in keys.OF_STREAMS.items():
                into.default(key, value, remark)
        if into.values.get("rl") == "simpo":
            for key, (value, remark) in keys.OF_SIMPO.items():
                into.default(key, value, remark)
        for key, (value, remark) in keys.DEFAULTS.items():
            into.default(key, value, remark)
        if self.stage == "pt":
            into.default("sample_packing", True, "of stage pt")


def _split(value: Any) -> list[str]:
    return [str(part).strip() for part in (value if isinstance(value, list) else str(value).split(","))]
