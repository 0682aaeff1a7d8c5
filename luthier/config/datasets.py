"""The keys that say which data is trained and how a row becomes tokens.

A dataset entry names its own columns; everything that it leaves unset falls back to what its `type` expects.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from luthier.config.base import Section

PROMPT_TYPES = ("alpaca", "alpaca_chat.load_qa")
TYPES = (*PROMPT_TYPES, "chat_template", "completion", "input_output")
"""The named types of rows for fine-tuning; besides them a mapping (a prompt of one's own), or none for rows that
are tokens already."""
TURNS_TYPES = ("default", "argilla", "argilla_chat", "icr", "intel", "prompt_pairs", "ultra")
PREFERENCE_NAMES = (
    *(f"chat_template.{name}" for name in ("default", "argilla", "argilla_chat")),
    *(f"{style}.{name}" for style in ("chatml", "llama3") for name in TURNS_TYPES),
    *("chatml", "llama3"),
    "zephyr.nectar",
    "user_defined.default",
    "passthrough.default",
)
"""The named types of rows for preference runs, which `preference_types` describes."""

# Checked in `entries`, whose message says more than that the text is none of these.
NamedType = Annotated[str, Field(json_schema_extra={"enum": [*TYPES, *PREFERENCE_NAMES]})]
TrainOnEos = Literal["turn", "last", "all"]


class UserPrompt(Section):
    """A prompt format of your own, written in place of a type's name."""

    system_prompt: str | None = None
    """System text used where a row has none."""
    system_format: str | None = None
    """How the system text is set, with `{system}` in it. Default: the text alone."""
    format: str | None = None
    """The prompt, with `{instruction}` and `{input}` in it (and `{system}`, if it belongs there)."""
    no_input_format: str | None = None
    """The prompt for rows whose input is empty, with `{instruction}` in it. Default: `format`."""
    field_instruction: str | None = None
    """Column of the instruction. Default: `instruction`."""
    field_input: str | None = None
    """Column of the input. Default: `input`."""
    field_output: str | None = None
    """Column of the answer. Default: `output`."""
    field_system: str | None = None
    """Column of the system text. Default: `system`."""
    field: str | None = None
    """Column of the whole text, for rows that are plain text; goes without `format`."""


class UserPreference(Section):
    """A format of your own for prompts and answers of a preference run, written in place of a type's name."""

    field_prompt: str | None = None
    """Column of the prompt. Default: `prompt`."""
    field_system: str | None = None
    """Column of the system text. Default: `system`."""
    field_chosen: str | None = None
    """Column of the chosen answer. Default: `chosen`."""
    field_rejected: str | None = None
    """Column of the rejected answer. Default: `rejected`."""
    field_completion: str | None = None
    """Column of the answer, for `rl: kto`. Default: `completion`."""
    field_label: str | None = None
    """Column that says whether the answer is desirable, for `rl: kto`. Default: `label`."""
    prompt_format: str | None = None
    """The prompt, with `{prompt}` in it, and `{system}` if it belongs there (empty where a row has none). Default:
    the prompt alone."""
    chosen_format: str | None = None
    """The chosen answer, with `{chosen}` in it. Default: the answer alone."""
    rejected_format: str | None = None
    """The rejected answer, with `{rejected}` in it. Default: the answer alone."""
    completion_format: str | None = None
    """The answer, with `{completion}` in it, for `rl: kto`. Default: the answer alone."""


class DatasetEntry(Section):
    """One dataset: where it is, what its rows look like, and which of their tokens are trained."""

    path: str
    """A file (json, jsonl, csv, parquet, arrow), a folder of them, or a dataset id on the Hugging Face hub.
    `#1000` at its end takes the first 1000 rows."""
    name: str | None = None
    """Configuration of a hub dataset (its subset)."""
    revision: str | None = None
    """Branch, tag or commit of a hub dataset."""
    split: str | None = None
    """Split to take. Default: `train`."""
    data_files: str | list[str] | None = None
    """Which files of the folder or hub dataset are read. Default: all of them."""
    ds_type: Literal["json", "csv", "parquet", "arrow"] | None = None
    """File format, where the file names do not say it. `json` stands for jsonl too."""
    type: NamedType | UserPrompt | UserPreference | None = None
    """What a row is: `alpaca`, `alpaca_chat.load_qa`, `chat_template`, `completion`, `input_output`, or a
    mapping that describes your own prompt. Unset: rows are tokens already (`input_ids` and `labels`). With `rl`:
    `chat_template.default`, `chatml.intel` and others (see the page on data formats), or a mapping; unset: `prompt`,
    `chosen` and `rejected`, or for `kto` `prompt`, `completion` and `label`."""
    field: str | None = None
    """Column of the text, for `completion`. Default: `text`."""
    field_instruction: str | None = None
    """Column of the instruction or question. Default: the type's."""
    field_input: str | None = None
    """Column of the input. Default: the type's."""
    field_output: str | None = None
    """Column of the answer. Default: the type's."""
    field_system: str | None = None
    """Column of the system text. Default: `system`."""
    field_messages: str | None = None
    """Column of the messages, for `chat_template` and `chat_template.default`. Default: `messages`, or
    `conversations` where that is there instead."""
    field_prompt: str | None = None
    """Column of the prompt, with `rl`. Default: the type's."""
    field_chosen: str | None = None
    """Column of the chosen answer, with `rl`. Default: the type's."""
    field_rejected: str | None = None
    """Column of the rejected answer, with `rl`. Default: the type's."""
    field_completion: str | None = None
    """Column of the answer, with `rl: kto`. Default: `completion`."""
    field_label: str | None = None
    """Column that says whether the answer is desirable, with `rl: kto`. Default: `label`."""
    prompt_format: str | None = None
    """For `user_defined.default`; see the format of your own for preference runs."""
    chosen_format: str | None = None
    """For `user_defined.default`; see the format of your own for preference runs."""
    rejected_format: str | None = None
    """For `user_defined.default`; see the format of your own for preference runs."""
    completion_format: str | None = None
    """For `user_defined.default` with `rl: kto`; see the format of your own for preference runs."""
    field_tools: str | None = None
    """Column of the tool descriptions, for `chat_template`. Default: `tools`."""
    message_property_mappings: dict[str, str] = {}
    """What the parts of a message are called in this dataset, such as `role: from` and `content: value`."""
    message_field_role: str | None = None
    """The same for the role alone."""
    message_field_content: str | None = None
    """The same for the content alone."""
    roles: dict[str, list[str]] = {}
    """Role names of the template, each with the names that this dataset has for it, such as `user:
    [human]`."""
    chat_template: str | None = None
    """Chat template for this dataset only; see the key of the same name at the top level."""
    roles_to_train: list[str] | None = None
    """Roles whose turns are trained. Default: `[assistant]`."""
    train_on_eos: TrainOnEos | None = None
    """Which end-of-turn tokens are trained: those of trained turns (`turn`), the last one (`last`), or `all`.
    Default: `turn`."""
    train_on_inputs: bool | None = None
    """Train prompts as well, for this dataset only. Default: the top-level key."""
    labels_shifted: bool = False
    """The `labels` column is already shifted by one against `input_ids`; it is shifted back before
    training."""
    weight: Annotated[float | None, Field(gt=0, allow_inf_nan=False)] = None
    """How often an epoch holds this dataset: 2 has each row twice, 0.5 half of the rows, and the next epoch the
    other half. With `mix_strategy: interleave`, its part of the mix beside the weights of the others. Default: 1."""
    epochs: Annotated[float | None, Field(gt=0, allow_inf_nan=False)] = None
    """How often the whole run goes through this dataset, in place of `weight`. Default: `num_epochs`, times
    `weight`."""


class DataConfig(Section):
    """What is trained on, and how it is turned into tokens."""

    datasets: Annotated[list[DatasetEntry], Field(min_length=1)]
    """The training data: a list of entries, each with `path`, `type`, and further keys of its own."""
    test_datasets: list[DatasetEntry] = []
    """Validation data, in the same form as `datasets`; instead of `val_set_size`."""
    val_set_size: Annotated[int, Field(ge=0)] | Annotated[float, Field(ge=0)] = 0
    """Part of the training data that is held out for validation: a fraction below 1, or a number of rows."""
    sequence_len: Annotated[int, Field(ge=1)] = 2048
    """Longest document, in tokens. What happens to longer ones is said by `excess_length_strategy`."""
    sample_packing: bool = False
    """Count `micro_batch_size` in packed rows of `sequence_len` tokens rather than in documents. Documents
    never see each other, and no padding is computed, either way."""
    excess_length_strategy: Literal["drop", "truncate", "raise"] = "drop"
    """What is done with documents longer than `sequence_len`; their number is reported in each case."""
    skip_bad_rows: bool = False
    """Leave out rows that cannot be read or lack a field, and report how many; otherwise the first one is an
    error."""
    train_on_inputs: bool = False
    """Train the prompts as well as the answers."""
    chat_template: str | None = None
    """Chat template: `tokenizer_default` (the model's own), a name such as `chatml` or `llama3`, a path of a
    `.jinja` file, or `jinja` for the text in `chat_template_jinja`. Default: the model's own."""
    chat_template_jinja: str | None = None
    """Text of a chat template, or the path of a file that holds it; goes with `chat_template: jinja`."""
    chat_template_kwargs: dict[str, Any] = {}
    """Variables handed to the chat template, such as `enable_thinking: false`."""
    eot_tokens: list[str] | None = None
    """Tokens that end a turn. Default: found from the chat template."""
    dataset_exact_deduplication: bool = False
    """Leave out training documents that are there before, or in the validation data, token for token; both are counted
    either way."""
    dataset_near_deduplication: Annotated[float | None, Field(ge=0.5, le=1)] = None
    """Leave out those as well that are nearly the same: from this Jaccard similarity of their runs of five tokens on,
    such as 0.8, for the whole and for what is trained of it."""
    dataset_prepared_path: str | None = None
    """Folder in which tokenised data is kept. Default: `$LUTHIER_CACHE`, or `~/.cache/luthier/datasets`."""
    dataset_processes: Annotated[int | None, Field(ge=1)] = None
    """Processes that tokenise. Default: as many as pay off on this machine."""
    mix_strategy: Literal["concat", "interleave", "temperature"] = "concat"
    """How several `datasets` become one epoch: `concat`, each as often as its `weight` says; `interleave`, in parts
    that the weights give, evenly spread; `temperature`, the same with parts that go by size, evened out by
    `mix_temperature`."""
    mix_temperature: Annotated[float | None, Field(gt=0, allow_inf_nan=False)] = None
    """For `temperature`: a dataset's part goes by (weight x rows) ^ (1 / mix_temperature). 1 is in proportion to the
    rows, more is more even. Default: 2."""
    mix_stopping: Literal["first_exhausted", "all_exhausted"] = "all_exhausted"
    """When an epoch of `interleave` or `temperature` ends: once every row of every dataset was seen, the smaller ones
    several times (`all_exhausted`), or once one dataset is through, so that no row comes twice (`first_exhausted`)."""
    streaming: bool = False
    """Read rows while training goes on, in place of reading and tokenising all of them before: for data larger than
    disk or memory. Needs `max_steps`."""
    shuffle_buffer_size: Annotated[int, Field(ge=1)] = 10_000
    """Rows of a stream that are held, tokenised, at a time, and put in a random order among themselves."""
    shuffle: bool = True
    """Draw documents in a random order, which `seed` fixes, anew in each epoch; otherwise in the data's own
    order."""
