"""TRL's trainers: their names and arguments before Luthier's own training; `SFTTrainer`, and what all have in common.

A trainer makes a Config of what it is given (`trainer.config`; `luthier train` would run it) and a run of the model
that it holds. Everything that a run leaves is in its folder: report, metrics, checkpoints, the adapter.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

from peft import PeftModel
from transformers import TrainerCallback
from transformers.trainer_utils import TrainOutput

from luthier.api.arguments import SFTConfig
from luthier.api.callbacks import Reporter, checked, early_stopping
from luthier.api.evaluate import evaluate_rows
from luthier.api.folders import GIVEN, ROWS, TOKENIZER, folder_to_resume, new_folder
from luthier.api.inputs import (
    check_others,
    check_place,
    computes_in,
    model_of,
    say_new_tokens,
    stored_as,
    tokenizer_of,
    trained_whole,
)
from luthier.api.models import check_length, notes_of
from luthier.api.peft_models import adapter_keys, adapter_values, fill, inner_of, without_adapter
from luthier.api.rows import GivenRows, preference_rows, sft_rows
from luthier.api.said import say_once, speak
from luthier.api.translate import keys_of, precision_keys
from luthier.config import Config
from luthier.config.preference import has_reference
from luthier.errors import ConfigError, ModelError, RunError
from luthier.models.adapter_files import adapter_tensors, read_adapter_tensors
from luthier.models.load import embeddings_of
from luthier.models.rope import positions
from luthier.train.run import Given, train

log = logging.getLogger("luthier")

# TRL's length of a row where nobody says one.
LENGTH = 1024


class Trainer:
    """What the trainers have in common."""

    arguments: ClassVar[type] = SFTConfig
    rl: ClassVar[str | None] = None
    _trained = False
    _start: dict[str, Any] | None = None  # the adapter as the last training began

    def __init__(
        self,
        model: Any,
        args: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        tokenizer: Any = None,
        peft_config: Any = None,
        callbacks: list[Any] | None = None,
        data_collator: Any = None,
        optimizers: tuple[Any, Any] = (None, None),
        max_seq_length: int | None = None,
        **others: Any,
    ) -> None:
        speak()
        name = type(self).__name__
        self.args = self.arguments() if args is None else args
        if not hasattr(self.args, "output_dir"):
            raise ConfigError(f"{name}: args is a {type(args).__name__}: write args={self.arguments.__name__}(...)")
        check_length(max_seq_length)
        check_others(name, others, data_collator, optimizers)
        self.processing_class = tokenizer_of(name, processing_class, tokenizer, model)
        self.model = model_of(model, self.args, peft_config, others.get("quantization_config"))
        self._notes = notes_of(self.model)
        self._max_seq_length = max_seq_length
        self._callbacks: list[TrainerCallback] = [checked(one) for one in callbacks or []]
        if train_dataset is None:
            raise ConfigError(f"{name}: it was given no train_dataset")
        self.train_dataset, self.eval_dataset = train_dataset, eval_dataset
        self._rows = self._rows_of(train_dataset, "train_dataset")
        self._eval_rows = None if eval_dataset is None else self._rows_of(eval_dataset, "eval_dataset")
        self._reporter = Reporter(self.args, [], {"model": self.model, "processing_class": self.processing_class})
        self.output_dir = Path(self.args.output_dir or "trainer_output").expanduser()
        self.config = self._config(self.output_dir)
        self._reporter.callbacks = early_stopping(self._callbacks)[0]
        self._reporter.tell("on_init_end")

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"{type(self).__name__} has no {name!r}: there are train, evaluate, save_model, add_callback, push_to_hub, "
            "state, args, config, model, output_dir and processing_class (docs/porting.md)"
        )

    @property
    def state(self) -> Any:
        """transformers' TrainerState: `log_history`, `global_step`, `best_metric`, ..."""
        return self._reporter.state

    @property
    def tokenizer(self) -> Any:
        return self.processing_class

    def add_callback(self, callback: Any) -> None:
        self._callbacks.append(checked(callback))
        self._reporter.callbacks = early_stopping(self._callbacks)[0]

    def train(self, resume_from_checkpoint: bool | str | Path | None = None, **others: Any) -> TrainOutput:
        """Train; the run's folder is `trainer.output_dir`.

        Args:
            resume_from_checkpoint: True goes on from the newest checkpoint, a path from that one. Otherwise a folder
                that holds a run already is left alone, and this one gets a folder beside it.

        Returns:
            transformers' TrainOutput: global_step, training_loss, metrics (train_runtime, train_loss, ...).
        """
        for name, value in others.items():
            if value is not None:
                raise ConfigError(f"train: {name}={value!r} is not built here; leave it out")
        asked = Path(self.args.output_dir or "trainer_output").expanduser()
        resume: str | None = None
        if resume_from_checkpoint:
            self.output_dir, resume = folder_to_resume(asked, resume_from_checkpoint)
        elif getattr(self.args, "overwrite_output_dir", False):
            self.output_dir = asked
        else:
            self.output_dir = new_folder(asked)
        self.config = self._config(self.output_dir, resume)
        given = self.output_dir / GIVEN
        self._rows.write(given / ROWS["train"], must_be_same=resume is not None)
        if self._eval_rows is not None:
            self._eval_rows.write(given / ROWS["eval"], must_be_same=resume is not None)
        self._save_tokenizer(given / TOKENIZER)
        return self._run()

    def _run(self) -> TrainOutput:
        began, model = time.perf_counter(), self.model
        say_new_tokens(model, self.config)
        values = adapter_values(model) if isinstance(model, PeftModel) else None
        self._trained, self._start = True, values
        self._reporter.restart(self.output_dir)
        was_training = model.training
        with without_adapter(model) as inner:
            result = train(self.config, Given(inner, values, self._reporter))
            trained = None
            if values is not None and result.finished:
                trained = read_adapter_tensors(result.output_dir)  # of the step that is kept
            elif values is not None:
                trained = adapter_tensors(inner, self.config.adapter.lora_modules_to_save)
        if trained is not None:
            fill(model, trained)
        model.train(was_training)
        if self._notes is not None:
            self._notes.run = self.config
        if not result.finished:
            log.warning("interrupted: go on with trainer.train(resume_from_checkpoint=True)")
        return self._output(result.state, time.perf_counter() - began)

    def _output(self, state: Any, seconds: float) -> TrainOutput:
        rows = [row for row in self.state.log_history if "loss" in row]
        training = self.config.training
        # The mean over the run's steps: each row is the mean of those since the row before.
        weights = [b - a for a, b in pairwise([0, *(row["step"] for row in rows)])]
        loss = sum(row["loss"] * w for row, w in zip(rows, weights, strict=True)) / max(1, sum(weights))
        rows_per_step = training.micro_batch_size * training.gradient_accumulation_steps
        metrics = {
            "train_runtime": seconds,
            "train_samples_per_second": state.step * rows_per_step / seconds,
            "train_steps_per_second": state.step / seconds,
            "train_tokens": state.tokens,
            "train_loss": loss,
            "epoch": self.state.epoch,
        }
        self.state.global_step = state.step
        self.state.log_history.append({**metrics, "step": state.step})
        self._reporter.tell("on_train_end")
        return TrainOutput(state.step, loss, metrics)

    def evaluate(self, eval_dataset: Any = None, metric_key_prefix: str = "eval", **others: Any) -> dict[str, float]:
        """The figures of the model as it stands, over `eval_dataset` or another dataset: those of an evaluation of the
        run. The reference is that of the last `train()`, and before one the model itself.

        Raises:
            RunError: a reference is needed, and was the model's own weights before they were trained.
        """
        if has_reference(self.rl) and self._trained and self._start is None:
            raise RunError(
                f"{type(self).__name__}.evaluate: without an adapter the reference was the model before training, and "
                'is not kept: give eval_strategy="steps", or use `luthier evaluate RUN --data FILE --compare base`'
            )
        rows = self._eval_rows if eval_dataset is None else self._rows_of(eval_dataset, "eval_dataset")
        if rows is None:
            raise ConfigError(f"{type(self).__name__}.evaluate: it was given no eval_dataset")
        began = time.perf_counter()
        values = adapter_values(self.model) if isinstance(self.model, PeftModel) else None
        with without_adapter(self.model) as inner:
            start = self._start if has_reference(self.rl) else None
            found = evaluate_rows(self.config, rows, self.processing_class, inner, values, start)
        figures = {f"{metric_key_prefix}_{name.removeprefix('eval_')}": value for name, value in found.items()}
        figures[f"{metric_key_prefix}_runtime"] = time.perf_counter() - began
        self.state.log_history.append({**figures, "epoch": self.state.epoch or 0.0, "step": self.state.global_step})
        self._reporter.tell("on_evaluate", metrics=dict(figures))
        return figures

    def save_model(self, output_dir: str | Path | None = None, _internal_call: bool = False) -> None:
        """The adapter (or the model) and its tokenizer, in a folder of their own; the run's folder has them already."""
        folder = Path(output_dir) if output_dir is not None else self.output_dir
        if folder == self.output_dir and (folder / "summary.json").is_file():
            return
        self.model.save_pretrained(folder)
        self.processing_class.save_pretrained(folder)

    def save_state(self) -> None:
        """The run's folder has it: metrics.jsonl, and the state of each checkpoint."""

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        return self.model.push_to_hub(*args, **kwargs)

    # --- the config

    def _rows_of(self, dataset: Any, name: str) -> GivenRows:
        return preference_rows(dataset, name)

    def _own_keys(self) -> dict[str, Any]:
        return {"rl": self.rl}

    def _config(self, folder: Path, resume: str | None = None) -> Config:
        """What `luthier train` would be given to make this run."""
        inner, notes = inner_of(self.model), self._notes
        loading = None if notes is None else notes.loading.model
        embeddings = embeddings_of(inner).weight
        check_place(inner)
        checkpointing = None if notes is None else notes.checkpointing
        given = folder / GIVEN
        keys: dict[str, Any] = {
            "base_model": inner.config._name_or_path,
            "revision": loading.revision if loading else None,
            "trust_remote_code": (loading.trust_remote_code if loading else False) or None,
            "attn_implementation": loading.attn_implementation if loading else None,
            "rope_parameters": loading.rope_parameters if loading else None,
            "tokenizer_config": str(given / TOKENIZER),
            "device_map": str(embeddings.device),
            "datasets": [self._entry(self._rows, given / ROWS["train"])],
            "test_datasets": [] if self._eval_rows is None else [self._entry(self._eval_rows, given / ROWS["eval"])],
            "sequence_len": self._length(),
            "excess_length_strategy": "truncate",
            "gradient_checkpointing": checkpointing or None,
            "output_dir": str(folder),
            "resume_from_checkpoint": resume,
            **stored_as(inner),
            **precision_keys(self.args, embeddings.dtype, computes_in(inner), embeddings.device),
            **(adapter_keys(self.model) if isinstance(self.model, PeftModel) else trained_whole(inner)),
            **keys_of(self.args, has_eval_data=self._eval_rows is not None, device=embeddings.device),
            **early_stopping(self._callbacks)[1],
            **self._own_keys(),
        }
        if (keys.get("max_prompt_len") or 0) >= keys["sequence_len"] == self._positions():
            keys["max_prompt_len"] = half = keys["sequence_len"] // 2
            say_once(f"max_prompt_length: {half}, half of the model's {keys['sequence_len']} positions")
        if not keys["base_model"]:
            raise ModelError(
                "the model was made in memory, and a run names the checkpoint that it begins from: "
                'model.save_pretrained("base"), then load it from there'
            )
        if getattr(self.args, "disable_dropout", False) and keys.get("lora_dropout"):
            say_once(f"{type(self).__name__}: disable_dropout=True is the default, and turns off lora_dropout too")
            keys["lora_dropout"] = None
        return Config.from_flat(keys, origin=type(self.args).__name__)

    def _entry(self, rows: GivenRows, path: Path) -> dict[str, Any]:
        whole = rows.kind.train_on_inputs
        return {"path": str(path), **rows.kind.entry, **({} if whole is None else {"train_on_inputs": whole})}

    def _positions(self) -> int | None:
        return positions(inner_of(self.model).config.get_text_config(decoder=True))

    def _length(self) -> int:
        limit = self._positions()
        said = self._max_seq_length or getattr(self.args, "max_length", None)
        if not said and "max_length" in getattr(self.args, "given", ()):
            return limit or 2**20  # max_length=None: nothing is cut
        said = said or (self._notes.max_seq_length if self._notes is not None else None) or LENGTH
        if limit is not None and said > limit:
            say_once(f"max_seq_length={said}: the model has {limit} positions, and longer rows are cut there")
            return limit
        return int(said)

    def _save_tokenizer(self, folder: Path) -> None:
        try:
            self.processing_class.save_pretrained(folder)
        except OSError as error:
            raise RunError(f"output_dir: {folder} cannot be written: {error.strerror or error}") from error


class SFTTrainer(Trainer):
    """Supervised fine-tuning with TRL's arguments, those of its older versions and Unsloth's among them."""

    _changes: tuple[Callable[[GivenRows], GivenRows], ...] = ()

    def __init__(
        self,
        model: Any,
        args: Any = None,
        *,
        dataset_text_field: str | None = None,
        packing: bool | None = None,
        dataset_num_proc: int | None = None,
        formatting_func: Callable[..., Any] | None = None,
        **others: Any,
    ) -> None:
        self._text_field = dataset_text_field or getattr(args, "dataset_text_field", None) or "text"
        self._packing = getattr(args, "packing", False) if packing is None else packing
        self._processes = dataset_num_proc
        self._formatting = formatting_func
        self._completion_only = getattr(args, "completion_only_loss", None)
        self._assistant_only = bool(getattr(args, "assistant_only_loss", False))
        loss = getattr(args, "loss_type", "nll")
        if loss not in ("nll", "chunked_nll"):
            raise ConfigError(f'SFTConfig: loss_type="{loss}" is not built here; write loss_type="nll"')
        super().__init__(model, args, **others)

    def change_rows(self, change: Callable[[GivenRows], GivenRows]) -> None:
        """Have what rows become changed, those of later evaluations too; see `train_on_responses_only`."""
        rows = change(self._rows_of(self.train_dataset, "train_dataset"))
        self._changes = (*self._changes, change)
        self._rows = rows
        if self.eval_dataset is not None:
            self._eval_rows = self._rows_of(self.eval_dataset, "eval_dataset")
        self.config = self._config(self.output_dir)

    def _rows_of(self, dataset: Any, name: str) -> GivenRows:
        rows = sft_rows(
            dataset,
            name,
            text_field=self._text_field,
            formatting_func=self._formatting,
            completion_only_loss=self._completion_only,
            assistant_only_loss=self._assistant_only,
        )
        for change in self._changes:
            rows = change(rows)
        return rows

    def _own_keys(self) -> dict[str, Any]:
        keys: dict[str, Any] = {"sample_packing": bool(self._packing)}
        if self._processes:
            keys["dataset_processes"] = self._processes
        if token := getattr(self.args, "eos_token", None):
            keys["special_tokens"] = {"eos_token": token}
        return keys
