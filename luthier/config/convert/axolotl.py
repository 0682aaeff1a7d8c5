"""A YAML of Axolotl's as a config of ours.

Most keys have the same name and meaning, for the names are Axolotl's. The tables in `axolotl_keys` say what the others
are; here is what a table cannot say: switches that are one key here, mappings, rows, and who shares the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from luthier.config.convert import axolotl_keys as keys
from luthier.config.convert import entries
from luthier.config.convert.arguments import settings
from luthier.config.convert.axolotl_plugins import PLUGINS, SPEED_ONLY
from luthier.config.convert.axolotl_sharing import Sharing
from luthier.config.convert.conversion import Conversion
from luthier.config.datasets import DatasetEntry, UserPreference, UserPrompt
from luthier.config.distributed import INSIDE_FSDP, FsdpConfig, plain_name
from luthier.config.needs import asks_for_something
from luthier.config.schema import FIELDS, SpecialTokens
from luthier.config.yaml_source import Source


def is_theirs(source: Source) -> bool:
    """Whether a file has keys that are unknown here, and all of them are Axolotl's."""
    theirs = keys.ALL - set(_unlisted(source))
    unknown = [key in theirs for key in source.values if key not in FIELDS]
    unknown += [known_there for known_here, known_there in _inside(source) if not known_here]
    return bool(unknown) and all(unknown)


def convert(source: Source) -> Conversion:
    """All keys of a file, each in its list, and Axolotl's defaults where ours are others."""
    into = Conversion(source, keys.TOOL)
    reader = _Axolotl(into, source)
    for key, value in source.values.items():
        reader.key(key, value)
    reader.sharing()
    reader.defaults()
    into.drop_idle()
    return into


class _Axolotl(Sharing):
    def __init__(self, into: Conversion, source: Source) -> None:
        super().__init__(into)
        self.given = {key: value for key, value in source.values.items() if value is not None}
        self.unlisted = _unlisted(source)

    def key(self, key: str, value: Any) -> None:
        """One key of the file."""
        own = getattr(self, f"_{key}", None) if key in keys.ALL else None
        if key in self.unlisted:
            plugin = self.unlisted[key]
            self.into.unknown(key, set(), f"Axolotl's without its plugin: `plugins: [{plugin}...]` is not there")
        elif (value is None or value in ([], {})) and (key in keys.ALL or key in FIELDS):
            self.into.no_effect(key)
        elif key in keys.MAPPINGS and not isinstance(value, dict):
            self.into.refuse(key, value, "expected a mapping.")
        elif own is not None:
            own(key, value)
        elif key in keys.ATTENTION:
            self._attention(key, value)
        elif key in FIELDS:
            self.into.carry(key, key, value, keys.OTHERWISE.get(key, "") if value else "")
        elif key in keys.RENAMED:
            self.into.carry(key, keys.RENAMED[key], value)
        elif key in keys.NO_EFFECT:
            self.into.no_effect(key, keys.NO_EFFECT[key])
        elif key in keys.REFUSED or key in keys.ESSENTIAL:
            self._refused(key, value)
        elif key not in keys.ALL:
            self.into.unknown(key, {*keys.ALL, *FIELDS}, "Axolotl's")

    def _refused(self, key: str, value: Any) -> None:
        if key.endswith(("parallel_size", "parallel_degree")) and value == 1:
            self.into.no_effect(key)
        elif key in keys.ESSENTIAL:
            self.into.refuse(key, value, keys.ESSENTIAL[key], essential=True)
        else:
            self.into.refuse(key, value, keys.REFUSED[key])

    # --- the model ---

    def _attention(self, key: str, value: Any) -> None:
        if value:
            self.into.carry(key, "attn_implementation", keys.ATTENTION[key])
        else:
            self.into.no_effect(key)

    def _attn_implementation(self, key: str, value: Any) -> None:
        if value in ("xformers", "sage", "s2", "fp8"):
            self.into.unsupported(key, f"{value}: write a name that transformers has, or leave it out.")
        else:
            self.into.carry(key, key, value)

    def _base_model_config(self, key: str, value: Any) -> None:
        if value == self.given.get("base_model"):
            self.into.no_effect(key, "it is base_model")
        else:
            self.into.unsupported(key, "a model is loaded with its own config: leave it out, or change base_model.")

    def _tokenizer_use_fast(self, key: str, value: Any) -> None:
        if value:
            self.into.no_effect(key, "tokenizers are fast ones wherever there is one")
        else:
            self.into.unsupported(key, "false: write the class of the slow tokenizer as tokenizer_type.")

    def _overrides_of_model_config(self, key: str, value: Any) -> None:
        written = value.get("rope_parameters") or value.get("rope_scaling")
        rope = dict(written) if isinstance(written, dict) else {}
        if "type" in rope:
            rope["rope_type"] = rope.pop("type")
        if "rope_theta" in value and rope:
            rope["rope_theta"] = value["rope_theta"]
        if rest := set(value) - ({"rope_parameters", "rope_scaling", "rope_theta"} if rope else set()):
            for name in sorted(rest, key=str):
                self.into.unsupported(f"{key}.{name}", "a model is loaded with its own config.")
        if rope:
            self.into.carry(key, "rope_parameters", rope)

    _model_config = _overrides_of_model_config

    def _bnb_config_kwargs(self, key: str, value: Any) -> None:
        for name, item in value.items():
            theirs = f"{key}.{name}"
            if name in ("bnb_4bit_quant_type", "bnb_4bit_use_double_quant"):
                self.into.carry(theirs, name, item)
            elif name in ("bnb_4bit_compute_dtype", "bnb_4bit_quant_storage"):
                self.into.no_effect(theirs, "the run's own precision is what is computed in")
            else:
                self.into.refuse(theirs, item, "bitsandbytes' other settings stay as they are.")

    def _peft(self, key: str, value: Any) -> None:
        for name, item in value.items():
            if name == "loftq_config":
                self.into.carry(f"{key}.{name}", name, item)
            else:
                self.into.unknown(f"{key}.{name}", {"loftq_config"}, "Axolotl's peft")

    def _lora_target_modules(self, key: str, value: Any) -> None:
        if value in ("all-linear", ["all-linear"]):
            self.into.carry(key, "lora_target_linear", True)
        elif asks_for_something(value):
            self.into.carry(key, key, value)
        else:
            self.into.no_effect(key)

    def _special_tokens(self, key: str, value: Any) -> None:
        for name in [name for name in value if name not in SpecialTokens.model_fields]:
            self.into.unknown(f"{key}.{name}", set(SpecialTokens.model_fields), "special_tokens")
        self.into.carry(key, key, {name: text for name, text in value.items() if name in SpecialTokens.model_fields})

    def _chat_template(self, key: str, value: Any) -> None:
        fallback = "tokenizer_default_fallback_"
        if isinstance(value, str) and value.startswith(fallback):
            self.into.carry(key, key, "tokenizer_default", f"without {value.removeprefix(fallback)} to fall back on")
        elif str(value) in keys.TEMPLATES or str(value).endswith((".jinja", ".jinja2")):
            self.into.carry(key, key, value)
        else:
            self.into.unsupported(key, f"there is no template {value}: write tokenizer_default, or a .jinja file.")

    # --- precision and memory ---

    def _bfloat16(self, key: str, value: Any) -> None:
        self._dtype(key, value, "bf16", True)

    def _float16(self, key: str, value: Any) -> None:
        self._dtype(key, value, "fp16", True)

    def _float32(self, key: str, value: Any) -> None:
        self._dtype(key, value, "bf16", False)

    def _dtype(self, key: str, value: Any, ours: str, becomes: bool) -> None:
        if value:
            self.into.carry(key, ours, becomes)
        else:
            self.into.no_effect(key)

    def _gradient_checkpointing(self, key: str, value: Any) -> None:
        if not self.given.get("activation_offloading"):
            self.into.carry(key, key, "offload" if value == "offload_disk" else value)
        else:
            self.into.no_effect(key, "activation_offloading says more")

    def _activation_offloading(self, key: str, value: Any) -> None:
        if value:
            self.into.carry(key, "gradient_checkpointing", "offload")
        else:
            self.into.no_effect(key)

    def _device(self, key: str, value: Any) -> None:
        if "device_map" in self.given:
            self.into.no_effect(key, "device_map says it")
        else:
            self.into.carry(key, "device_map", value)

    # --- the data ---

    def _datasets(self, key: str, value: Any) -> None:
        entries.carry(self.into, key, value, self.given)

    _test_datasets = _datasets
    _pretraining_dataset = _datasets

    def _streaming(self, key: str, value: Any) -> None:
        if value:
            self.into.carry(key, key, value)
        else:
            self.into.no_effect(key)

    def _streaming_multipack_buffer_size(self, key: str, value: Any) -> None:
        if self.given.get("streaming"):
            self.into.carry(key, "shuffle_buffer_size", value)
        else:
            self.into.no_effect(key, "data is shuffled and packed as a whole")

    _pretrain_multipack_buffer_size = _streaming_multipack_buffer_size

    def _curriculum_sampling(self, key: str, value: Any) -> None:
        if value:
            self.into.carry(key, "shuffle", False)
        else:
            self.into.no_effect(key)

    # --- the steps ---

    def _batch_size(self, key: str, value: Any) -> None:
        micro = self.given.get("micro_batch_size", 1)
        if "gradient_accumulation_steps" in self.given:
            self.into.no_effect(key, "micro_batch_size and gradient_accumulation_steps say it")
        elif isinstance(value, int) and isinstance(micro, int) and micro and value % micro == 0:
            self.into.carry(key, "gradient_accumulation_steps", value // micro)
        else:
            self.into.unsupported(key, "write micro_batch_size and gradient_accumulation_steps.")

    def _optim_args(self, key: str, value: Any) -> None:
        self.into.carry(key, key, settings(value) if isinstance(value, str) else value)

    def _lr_scheduler_kwargs(self, key: str, value: Any) -> None:
        rest = dict(value)
        if "min_lr_rate" in rest:
            self.into.carry(key, "cosine_min_lr_ratio", rest.pop("min_lr_rate"))
        for name in rest:
            self.into.unsupported(f"{key}.{name}", "no key here says it.")

    def _auto_resume_from_checkpoints(self, key: str, value: Any) -> None:
        if value and "resume_from_checkpoint" not in self.given:
            self.into.carry(key, "resume_from_checkpoint", "auto")
        else:
            self.into.no_effect(key)

    def _save_strategy(self, key: str, value: Any) -> None:
        if self.given.get("save_steps") or self.given.get("saves_per_epoch"):
            self.into.no_effect(key, "save_steps or saves_per_epoch says it")
        elif value in ("no", False, "epoch"):
            self.into.carry(key, "saves_per_epoch", int(value == "epoch"))
        elif value == "best":
            self.into.carry(key, "load_best_model_at_end", True)
        else:
            self.into.default("save_steps", 500)
            self.into.carried(key, "save_steps: 500")

    def _eval_strategy(self, key: str, value: Any) -> None:
        if self.given.get("eval_steps") or self.given.get("evals_per_epoch"):
            self.into.no_effect(key, "eval_steps or evals_per_epoch says it")
        elif value in ("no", False, "epoch"):
            self.into.carry(key, "evals_per_epoch", int(value == "epoch"))
        else:
            self.into.unsupported(key, f"{value}: write eval_steps.")

    _evaluation_strategy = _eval_strategy

    def _metric_for_best_model(self, key: str, value: Any) -> None:
        if value in ("loss", "eval_loss"):
            self.into.no_effect(key, "the best is what has the lowest loss")
        else:
            self.into.unsupported(key, f"{value}: the best is what has the lowest loss.")

    def _greater_is_better(self, key: str, value: Any) -> None:
        self.into.refuse(key, value, "the best is what has the lowest loss.")

    # --- preferences ---

    def _rl(self, key: str, value: Any) -> None:
        self.into.carry(key, key, value)
        if key not in self.into.values:
            self.into.report.essential.add(key)

    def _adapter(self, key: str, value: Any) -> None:
        self.into.carry(key, key, value)
        if key not in self.into.values:
            self.into.report.essential.add(key)

    def _dpo_loss_type(self, key: str, value: Any) -> None:
        one = value[0] if isinstance(value, list) and len(value) == 1 else value
        self.into.carry(key, key, one)

    def _trl(self, key: str, value: Any) -> None:
        for name, item in value.items():
            if name == "beta" and item is not None:
                self.into.carry(f"{key}.{name}", "rl_beta", item)
            else:
                why = "it is for methods that generate answers while they train, and there are none here."
                self.into.refuse(f"{key}.{name}", item, why)

    # --- trackers ---

    def _use_wandb(self, key: str, value: Any) -> None:
        if value:
            self._tracker(key, value)
        else:
            self.into.no_effect(key, "wandb_project is left out" if "wandb_project" in self.given else "")

    def _wandb_project(self, key: str, value: Any) -> None:
        if self.given.get("use_wandb") is False or value == "":
            self.into.no_effect(key, "use_wandb is off" if value else "")
        else:
            self.into.carry(key, key, value)

    def _wandb_log_model(self, key: str, value: Any) -> None:
        if self.given.get("use_wandb") is False or value in ("", "false", False):
            self.into.no_effect(key, "use_wandb is off" if value not in ("", "false", False) else "")
        else:
            self.into.carry(key, key, value)

    def _tracker(self, key: str, value: Any) -> None:
        if value:
            name = key.removeprefix("use_")
            self.into.carry(key, "report_to", [*self.into.values.get("report_to", []), name])
        else:
            self.into.no_effect(key)

    _use_mlflow = _use_tensorboard = _use_trackio = _tracker

    def _plugins(self, key: str, value: Any) -> None:
        listed = value if isinstance(value, list) else [value]
        for number, name in enumerate(listed):
            theirs = f"{key}.{number}"
            module = _module(str(name))
            if module in SPEED_ONLY:
                self.into.no_effect(theirs, f"{name}: fused kernels are used as they are")
            elif module is not None:
                self.into.unsupported(theirs, f"{name}: what it does is not built here.", essential=True)
            else:
                self.into.unsupported(theirs, f"{name}: code of its own is not run here.", essential=True)
            for inside, why in PLUGINS.get(module or "", {}).items():
                if inside in self.given and inside not in FIELDS:
                    if why:
                        self.into.no_effect(inside, why)
                    else:
                        self.into.refuse(inside, self.given[inside], f"it belongs to {name}.")

    def defaults(self) -> None:
        """What Axolotl does where the file says nothing."""
        into = self.into
        for key, (value, remark) in keys.DEFAULTS.items():
            warm = key == "warmup_ratio" and into.has("warmup_steps")
            recomputes = key == "gradient_checkpointing" and (into.values.get("fsdp_config") or {}).get(
                "activation_checkpointing"
            )
            if not warm and not recomputes:
                into.default(key, value, remark)
        if not into.has("eval_steps", "evals_per_epoch"):
            into.default("evals_per_epoch", 0, "nothing is evaluated without eval_steps or evals_per_epoch")
        if into.values.get("generate_samples"):
            for key, (value, remark) in keys.OF_SAMPLES.items():
                into.default(key, value, remark)
        if into.values.get("rl") == "simpo":
            for key, (value, remark) in keys.OF_SIMPO.items():
                into.default(key, value, remark)


def _module(plugin: str) -> str | None:
    """The plugin's module, if it is one of Axolotl's own."""
    return next((name for name in PLUGINS if plugin == name or plugin.startswith(f"{name}.")), None)


def _unlisted(source: Source) -> dict[str, str]:
    """Keys of plugins that the file does not list, with the plugin."""
    listed = source.values.get("plugins") or []
    there = {_module(str(name)) for name in (listed if isinstance(listed, list) else [listed])}
    return {key: name for name, inside in PLUGINS.items() if name not in there for key in inside}


def _inside(source: Source) -> Iterator[tuple[bool, bool]]:
    """Of each key inside of a mapping: whether it is known here, and whether it is in Axolotl."""
    for key in ("datasets", "test_datasets"):
        listed = source.values.get(key)
        for entry in listed if isinstance(listed, list) else []:
            for name, value in entry.items() if isinstance(entry, dict) else ():
                yield name in DatasetEntry.model_fields, name in entries.ENTRY_KEYS
                if name == "type" and isinstance(value, dict):
                    yield from ((inner in _PROMPT, False) for inner in value)
    fsdp = source.values.get("fsdp_config")
    for name in fsdp if isinstance(fsdp, dict) else ():
        plain = str(name).removeprefix(FsdpConfig.prefix)
        yield plain_name(name) in FsdpConfig.model_fields, plain in INSIDE_FSDP or name == "fsdp_version"


_PROMPT = {*UserPrompt.model_fields, *UserPreference.model_fields}
