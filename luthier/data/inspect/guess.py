"""What rows are, guessed from the columns of the first one; whoever calls says so."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from luthier.data.values import Row
from luthier.errors import DataError

_PROMPTS = ("prompt", "question", "problem", "query", "instruction", "input", "text")
_ANSWERS = ("answer", "completion", "response", "output", "solution", "reply", "target")


@dataclass(frozen=True, slots=True)
class Guess:
    """Keys of a dataset entry, the method that such rows are for, and the columns that say so."""

    entry: dict[str, Any]
    columns: tuple[str, ...]
    rl: str | None = None
    named: dict[str, Any] = field(default_factory=dict)


def guess(row: Row, where: str) -> Guess:
    """What a row looks like. Raises DataError if like nothing that is known."""
    columns = {name for name, value in row.items() if value is not None}
    messages = next((name for name in ("messages", "conversations") if isinstance(row.get(name), list)), None)
    labelled = isinstance(row.get("label"), bool)
    if {"chosen", "rejected"} <= columns:
        if messages is not None:
            entry = {"type": "chat_template.default", "field_messages": messages}
            return Guess(entry, (messages, "chosen", "rejected"), "dpo")
        if "prompt" not in columns and "question" in columns:
            return Guess({"type": "chatml.intel"}, ("question", "chosen", "rejected"), "dpo")
        return Guess({}, tuple(name for name in ("prompt", "chosen", "rejected") if name in columns), "dpo")
    if labelled and messages is not None:
        return Guess({"type": "chat_template.default", "field_messages": messages}, (messages, "label"), "kto")
    if labelled and {"prompt", "completion"} <= columns:
        return Guess({}, ("prompt", "completion", "label"), "kto")
    if messages is not None:
        return Guess({"type": "chat_template"}, (messages,))
    if "input_ids" in columns:
        return Guess({}, ("input_ids",))
    if isinstance(row.get("segments"), list):
        return Guess({"type": "input_output"}, ("segments",))
    if {"instruction", "output"} <= columns:
        return Guess({"type": "alpaca"}, ("instruction", "output"))
    if {"question", "answer"} <= columns:
        return Guess({"type": "alpaca_chat.load_qa"}, ("question", "answer"))
    prompt = next((name for name in _PROMPTS if isinstance(row.get(name), str)), None)
    answer = next((name for name in _ANSWERS if isinstance(row.get(name), str | int) and name != prompt), None)
    if prompt is not None and answer is not None:
        own = {"field_instruction": prompt, "field_output": answer, "format": "{instruction}\n"}
        return Guess({"type": own}, (prompt, answer))
    if "text" in columns:
        return Guess({"type": "completion"}, ("text",))
    raise DataError(
        f"{where}: what these rows are cannot be guessed from their columns ({', '.join(row) or 'none'}). Say "
        "it with "
        "--type, such as `--type completion`, or inspect a config that names the columns."
    )
