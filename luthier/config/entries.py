"""What a dataset entry says by itself: which kind of rows it names, and what is wrong with it.

All of it is known before any row is read, so it is part of the report on the config, with file and line.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from string import Formatter

from luthier.config.datasets import PROMPT_TYPES, TYPES, DatasetEntry, UserPrompt

PROMPT_FIELDS = ("field_instruction", "field_input", "field_output", "field_system")

_READ: dict[str, frozenset[str]] = {
    "prompt": frozenset({*PROMPT_FIELDS, "train_on_inputs"}),
    "completion": frozenset({"field"}),
    "input_output": frozenset({"field", "train_on_inputs"}),
    "tokens": frozenset({"labels_shifted"}),
    "chat_template": frozenset(
        {
            "field_messages",
            "field_tools",
            "field_system",
            "message_property_mappings",
            "roles",
            "chat_template",
            "roles_to_train",
            "train_on_eos",
            "train_on_inputs",
        }
    ),
}
"""Keys of an entry that not every kind of rows reads, and which do."""
_WHO = {
    "prompt": "prompts with an answer (alpaca and the like)",
    "completion": "`type: completion`",
    "input_output": "`type: input_output`",
    "tokens": "rows that are tokens already (no `type`)",
    "chat_template": "`type: chat_template`",
}

Flaw = tuple[tuple[str, ...], str]
"""Keys that lead to the value inside of the entry, and what is wrong with it."""


def kind_of(entry: DatasetEntry) -> str | None:
    """`prompt`, `chat_template`, `completion`, `input_output` or `tokens`; None for an unknown type."""
    if entry.type is None:
        return "tokens"
    if isinstance(entry.type, UserPrompt):
        return "completion" if entry.type.field else "prompt"
    if entry.type in PROMPT_TYPES:
        return "prompt"
    return entry.type if entry.type in TYPES else None


def flaws(entry: DatasetEntry, train_on_inputs: bool = False) -> Iterator[Flaw]:
    """All that is wrong with an entry; `train_on_inputs` is the top-level key."""
    kind = kind_of(entry)
    if kind is None:
        yield ("type",), _unknown_type(str(entry.type))
        return
    optional = frozenset().union(*_READ.values())
    for name in sorted(optional - _READ[kind]):
        if getattr(entry, name):
            others = " and ".join(_WHO[other] for other, read in _READ.items() if name in read)
            rows = "rows of tokens" if kind == "tokens" else "this type"
            yield (name,), f"{name} does nothing with {rows}; it goes with {others}. Leave it out."
    if isinstance(entry.type, UserPrompt):
        yield from _prompt_flaws(entry.type, entry)
    on_inputs = train_on_inputs if entry.train_on_inputs is None else entry.train_on_inputs
    if kind == "chat_template" and on_inputs:
        for name in ("roles_to_train", "train_on_eos"):
            if getattr(entry, name) is not None:
                yield (
                    (name,),
                    f"{name} does nothing with `train_on_inputs: true`, which trains whole conversations: leave "
                    "out one of the two.",
                )


def _unknown_type(name: str) -> str:
    close = difflib.get_close_matches(name, TYPES, n=1)
    meant = f" Did you mean `{close[0]}`?" if close else ""
    if name.startswith("sharegpt"):
        meant = " Write `chat_template`, which reads from/value as well."
    return (
        f"there is no type `{name}`.{meant} Types: {', '.join(TYPES)}; a mapping with `format` for a prompt of "
        "your own; or no `type` at all for rows that have `input_ids`."
    )


def _prompt_flaws(prompt: UserPrompt, entry: DatasetEntry) -> Iterator[Flaw]:
    if prompt.field:
        for name in prompt.model_fields_set - {"field"}:
            if getattr(prompt, name):
                yield (
                    ("type", name),
                    f"{name} does nothing beside `field`, which takes a column as plain text: leave out one of "
                    "the two.",
                )
        if entry.field:
            yield ("field",), "field is in `type` as well: leave out one of the two."
        return
    for name in PROMPT_FIELDS:
        if getattr(prompt, name) and getattr(entry, name):
            yield (name,), f"{name} is in `type` as well: leave out one of the two."
    if not prompt.format:
        yield (
            ("type",),
            "a prompt of your own needs `format` (or `field`, for one column of text).",
        )
        return
    broken = list(_template_flaws("format", prompt.format, {"instruction", "input", "system", "output"}))
    yield from broken
    if not broken and "{instruction}" not in prompt.format and "{input}" not in prompt.format:
        yield (
            ("type", "format"),
            "there is neither {instruction} nor {input} in it, so each row would be the same.",
        )
    if prompt.no_input_format is not None:
        yield from _template_flaws(
            "no_input_format", prompt.no_input_format, {"instruction", "system", "output"}
        )
    if prompt.system_format is not None:
        broken = list(_template_flaws("system_format", prompt.system_format, {"system"}))
        yield from broken
        if not broken and "{system}" not in prompt.system_format:
            yield ("type", "system_format"), "there is no {system} in it, so the system text would be lost."


def _template_flaws(key: str, template: str, allowed: set[str]) -> Iterator[Flaw]:
    path = ("type", key)
    try:
        parts = list(Formatter().parse(template))
    except ValueError as error:
        yield path, f"{error}. A brace that is text is written twice: {{{{ or }}}}."
        return
    names = [name for _, name, _, _ in parts if name is not None]
    unknown = [name for name in names if name not in allowed]
    plain = all(not spec and not conversion for _, name, spec, conversion in parts if name is not None)
    if unknown or not plain:
        known = ", ".join(f"{{{name}}}" for name in sorted(allowed))
        yield (
            path,
            f"{{{unknown[0] if unknown else names[0]}}} is not one of the places that it can have ({known}). "
            "A brace that is text is written twice: {{ or }}.",
        )
    if "output" in names and (names.count("output") > 1 or names[-1] != "output"):
        yield path, "{output} can be there once, behind all other places."
