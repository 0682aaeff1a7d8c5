"""A notebook's dataset as a dataset of a config: its rows in a file, and the entry that says what they are.

What a row is goes by its columns, as in TRL. Rows are written as they are, less the columns that are not read, so that
the run can be resumed, reported and repeated from its folder.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from luthier.api.said import say_once
from luthier.errors import DataError, RunError

Row = dict[str, Any]

_TAKEN = (
    "a text column (dataset_text_field), `messages`, `conversations`, `prompt` and `completion`, `instruction` and "
    "`output`, or `input_ids`"
)


@dataclass(frozen=True)
class Kind:
    """What rows are: the entry's keys, the columns that are kept, and what a row becomes.

    Attributes:
        train_on_inputs: of this kind, where the notebook does not say; None: the config's default.
    """

    entry: dict[str, Any]
    columns: tuple[str, ...]
    convert: Callable[[Row], Row] = dict
    train_on_inputs: bool | None = None


@dataclass(frozen=True)
class GivenRows:
    """A dataset and what its rows are."""

    dataset: Any
    kind: Kind
    name: str = field(default="train_dataset")

    def __iter__(self) -> Iterator[Row]:
        for index, row in enumerate(rows_of(self.dataset, self.name)):
            kept = {column: row[column] for column in self.kind.columns if row.get(column) is not None}
            try:
                yield self.kind.convert(kept)
            except DataError as error:
                raise DataError(f"{self.name}[{index}]: {error}") from error

    def write(self, path: Path, *, must_be_same: bool) -> None:
        """Write the rows as JSONL.

        Args:
            must_be_same: a run that goes on from a checkpoint: rows that are there already may not change.

        Raises:
            DataError: they would; or a row cannot be written. RunError: the folder cannot be written.
        """
        partial = path.with_name(path.name + ".partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("w", encoding="utf-8") as file:
                for index, row in enumerate(self):
                    try:
                        file.write(json.dumps(row, ensure_ascii=False, default=_plain) + "\n")
                    except TypeError as error:
                        what = "a row holds texts, numbers and lists"
                        raise DataError(f"{self.name}[{index}]: {error}; {what}") from error
            if must_be_same and path.exists() and path.read_bytes() != partial.read_bytes():
                partial.unlink()
                raise DataError(
                    f"resume_from_checkpoint: {self.name} has other rows than the run that it goes on from ({path}); "
                    "give it the same dataset, or train anew without resume_from_checkpoint"
                )
            os.replace(partial, path)
        except OSError as error:
            raise RunError(f"output_dir: {path} cannot be written: {error.strerror or error}") from error


def rows_of(dataset: Any, name: str) -> Iterable[Row]:
    """The rows of what a notebook calls a dataset.

    Raises:
        DataError: what it is cannot be read more than once, or is no dataset; says what to write instead.
    """
    if isinstance(dataset, Mapping):  # DatasetDict among them
        keys = ", ".join(map(str, dataset))
        one = f"{name}=dataset[{next(iter(dataset))!r}]"
        raise DataError(f"{name} is several datasets ({keys}): choose one, such as {one}")
    if type(dataset).__name__ == "IterableDataset" or not hasattr(dataset, "__len__"):
        raise DataError(
            f"{name} is a stream ({type(dataset).__name__}); a run knows its data before its first step, so that it "
            f"can be resumed: write {name}=Dataset.from_list(list(dataset.take(10_000))), or load it without streaming"
        )
    if isinstance(dataset, str):
        raise DataError(f'{name} is a text: write {name}=load_dataset("{dataset[:80]}", split="train"), of `datasets`')
    if not len(dataset):
        raise DataError(f"{name} is empty")

    def rows() -> Iterator[Row]:
        for row in dataset if not hasattr(dataset, "iter") else _batched(dataset):
            if isinstance(row, str):
                yield {"text": row}
            elif isinstance(row, Mapping):
                yield dict(row)
            else:
                raise DataError(f"{name}: a row is a {type(row).__name__}; rows are dictionaries of columns, or texts")

    return rows()


def _batched(dataset: Any) -> Iterator[Row]:
    """`datasets.Dataset` reads a thousand rows as fast as one."""
    for batch in dataset.iter(batch_size=1000):
        names = list(batch)
        for values in zip(*(batch[name] for name in names), strict=True):
            yield dict(zip(names, values, strict=True))


def sft_rows(
    dataset: Any,
    name: str,
    *,
    text_field: str | None,
    formatting_func: Callable[..., Any] | None,
    completion_only_loss: bool | None,
    assistant_only_loss: bool,
) -> GivenRows:
    """What rows of supervised fine-tuning are, by the first of them.

    Args:
        text_field: TRL's `dataset_text_field`. completion_only_loss: None trains completions where there are prompts.
    """
    if formatting_func is not None:
        return GivenRows(_Formatted(dataset, formatting_func, name), _text("text"), name)
    first = _first(dataset, name)
    if "input_ids" in first:
        kind = _tokens(first, completion_only_loss, assistant_only_loss)
    elif "messages" in first or ("conversations" in first and text_field not in first):
        column = "messages" if "messages" in first else "conversations"
        kind = Kind(
            {"type": "chat_template", "field_messages": column},
            (column, "tools"),
            train_on_inputs=not assistant_only_loss,
        )
        if not assistant_only_loss:
            say_once(
                f"{name}: all tokens of the conversations are trained, as TRL does; "
                "SFTConfig(assistant_only_loss=True) trains the answers alone"
            )
    elif "prompt" in first and "completion" in first:
        whole = completion_only_loss is False
        if isinstance(first["prompt"], str):
            prompt = {"format": "{instruction}", "field_instruction": "prompt", "field_output": "completion"}
            kind = Kind({"type": prompt}, ("prompt", "completion"), train_on_inputs=whole)
        else:
            convert = _as_one_conversation if whole else _as_messages
            kind = Kind({"type": "chat_template"}, ("prompt", "completion", "tools"), convert, whole)
    elif text_field in first:
        kind = _text(str(text_field))
        if completion_only_loss:
            raise DataError("completion_only_loss=True: the rows are plain text; give `prompt` and `completion`")
    elif "instruction" in first and "output" in first:
        say_once(f"{name}: `instruction` and `output` are put into Alpaca's prompt, and the answers alone are trained")
        kind = Kind({"type": "alpaca"}, ("instruction", "input", "output", "system"))
    else:
        raise DataError(f"{name} has the columns {', '.join(first)}, and none that a trainer reads: {_TAKEN}")
    if assistant_only_loss and kind.entry.get("type") != "chat_template" and "input_ids" not in first:
        raise DataError("assistant_only_loss=True is for conversations: give the rows as `messages`")
    return GivenRows(dataset, kind, name)


def preference_rows(dataset: Any, name: str) -> GivenRows:
    """Pairs: `chosen` and `rejected`, texts or messages, with a `prompt` or with a beginning in common."""
    first = _first(dataset, name)
    missing = [column for column in ("chosen", "rejected") if column not in first]
    if missing:
        raise DataError(
            f"{name} has the columns {', '.join(first)}, and no {' and no '.join(missing)}: a pair is `prompt`, "
            "`chosen` and `rejected`"
        )
    return GivenRows(dataset, Kind({}, ("prompt", "chosen", "rejected", "tools")), name)


def labelled_rows(dataset: Any, name: str) -> GivenRows:
    """Answers with a label: `completion` and `label`, or pairs, of which each is two of them."""
    first = _first(dataset, name)
    if "label" not in first and "chosen" in first:
        return preference_rows(dataset, name)
    missing = [column for column in ("completion", "label") if column not in first]
    if missing:
        raise DataError(
            f"{name} has the columns {', '.join(first)}, and no {' and no '.join(missing)}: an answer is `prompt`, "
            "`completion` and `label` (true: desirable)"
        )
    return GivenRows(dataset, Kind({}, ("prompt", "completion", "label", "tools")), name)


def _first(dataset: Any, name: str) -> Row:
    return next(iter(rows_of(dataset, name)))


def _text(column: str) -> Kind:
    return Kind({"type": "completion", "field": column}, (column,))


def _as_messages(row: Row) -> Row:
    """Prompt and completion as one conversation, of which the completion is trained."""
    prompt, completion = row.get("prompt"), row.get("completion")
    if not isinstance(prompt, list) or not isinstance(completion, list):
        raise DataError("`prompt` and `completion` have to be both text or both messages")
    messages = [{**message, "train": False} for message in prompt]
    messages += [{**message, "train": message.get("role") == "assistant"} for message in completion]
    return {"messages": messages, **({"tools": row["tools"]} if row.get("tools") else {})}


def _as_one_conversation(row: Row) -> Row:
    found = _as_messages(row)
    found["messages"] = [{k: v for k, v in message.items() if k != "train"} for message in found["messages"]]
    return found


def _tokens(first: Row, completion_only: bool | None, assistant_only: bool) -> Kind:
    masks = []
    if assistant_only and "assistant_masks" in first:
        masks.append("assistant_masks")
    if completion_only is not False and "completion_mask" in first:
        masks.append("completion_mask")

    def convert(row: Row) -> Row:
        ids = [int(each) for each in row["input_ids"]]
        labels = [int(each) for each in row.get("labels", ids)]
        for mask in masks:
            labels = [label if int(kept) else -100 for label, kept in zip(labels, row[mask], strict=True)]
        return {"input_ids": ids, "labels": labels}

    return Kind({}, ("input_ids", "labels", *masks), convert)


class _Formatted:
    """Rows made by a `formatting_func`: of one row at a time (TRL), or of a batch of them (Unsloth, older TRL)."""

    def __init__(self, dataset: Any, function: Callable[..., Any], name: str) -> None:
        self.dataset, self.function, self.name = dataset, function, name
        few = list(islice(rows_of(dataset, name), 2))
        self.batched = self._is_batched(few)

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[Row]:
        if not self.batched:
            for row in rows_of(self.dataset, self.name):
                yield {"text": self._one(row)}
            return
        rows = iter(rows_of(self.dataset, self.name))
        while batch := list(islice(rows, 1000)):
            texts = self.function(_columns(batch))
            if len(texts) != len(batch):
                raise DataError(f"formatting_func: {len(texts)} texts for {len(batch)} rows")
            yield from ({"text": text} for text in texts)

    def _one(self, row: Row) -> str:
        text = self.function(row)
        text = text[0] if isinstance(text, list) and len(text) == 1 else text
        if not isinstance(text, str):
            raise DataError(f"formatting_func: it returns a {type(text).__name__} for a row, and has to return a text")
        return text

    def _is_batched(self, few: Sequence[Row]) -> bool:
        of_row: Any = None
        problem: Exception | None = None
        try:
            of_row = self.function(dict(few[0]))
        except Exception as error:
            problem = error
        if isinstance(of_row, str):
            return False
        try:
            of_batch = self.function(_columns(few))
        except Exception as error:
            if problem is None and isinstance(of_row, list) and len(of_row) == 1:
                return False
            cause = problem or error
            what = f"{type(cause).__name__}: {cause}"
            raise DataError(f"formatting_func fails on the first row of {self.name}: {what}") from cause
        return isinstance(of_batch, list) and len(of_batch) == len(few)


def _columns(rows: Sequence[Row]) -> dict[str, list[Any]]:
    return {name: [row.get(name) for row in rows] for name in rows[0]}


def _plain(value: Any) -> Any:
    if hasattr(value, "tolist"):  # tensors and arrays
        return value.tolist()
    if hasattr(value, "item"):
        return value.item()
    raise TypeError(f"a {type(value).__name__} cannot be written as JSON")
