"""What a dataset entry says by itself: which kind of rows it names, and what is wrong with it.

All of it is known before any row is read, so it is part of the report on the config, with file and line.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from string import Formatter

from luthier.config.artifact_names import flaw, is_artifact, without_count
from luthier.config.datasets import (
    PREFERENCE_NAMES,
    PROMPT_TYPES,
    TYPES,
    DatasetEntry,
    UserPreference,
    UserPrompt,
)
from luthier.config.preference_types import (
    FORMATS,
    LABEL_FIELDS,
    PAIR_FIELDS,
    PAIR_FORMATS,
    is_preference,
    keys_read,
    preference_type,
    setting,
)

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
            "message_field_role",
            "message_field_content",
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

# Keys of an entry that only preference runs read.
_OF_PREFERENCES = ("field_prompt", *PAIR_FIELDS, *LABEL_FIELDS, *FORMATS)

Flaw = tuple[tuple[str, ...], str]
"""Keys that lead to the value inside of the entry, and what is wrong with it."""


def kind_of(entry: DatasetEntry, rl: str | None = None) -> str | None:
    """`prompt`, `chat_template`, `completion`, `input_output` or `tokens`, or with `rl` `preference`; None for a type
    that such a run has not."""
    if rl is not None:
        return "preference" if preference_type(entry) is not None else None
    if entry.type is None:
        return "tokens"
    if isinstance(entry.type, UserPreference):
        return None
    if isinstance(entry.type, UserPrompt):
        return "completion" if entry.type.field else "prompt"
    if entry.type in PROMPT_TYPES:
        return "prompt"
    return entry.type if entry.type in TYPES else None


def flaws(entry: DatasetEntry, train_on_inputs: bool = False, rl: str | None = None) -> Iterator[Flaw]:
    """All that is wrong with an entry; `train_on_inputs` and `rl` are the top-level keys."""
    if entry.weight is not None and entry.epochs is not None:
        yield ("epochs",), "it says how often the run goes through the dataset, and so does weight: leave out one."
    if is_artifact(entry.path) and (problem := flaw(without_count(entry.path)[0])):
        yield ("path",), problem
    kind = kind_of(entry, rl)
    if kind is None:
        yield ("type",), _unfit_type(entry, rl)
        return
    if rl is not None:
        yield from _preference_flaws(entry, rl)
        return
    optional = frozenset().union(*_READ.values())
    for name in sorted(optional - _READ[kind]):
        if getattr(entry, name):
            others = " and ".join(_WHO[other] for other, read in _READ.items() if name in read)
            rows = "rows of tokens" if kind == "tokens" else "this type"
            yield (name,), f"{name} does nothing with {rows}; it goes with {others}. Leave it out."
    for name in _OF_PREFERENCES:
        if getattr(entry, name):
            yield (name,), f"{name} is for preference tuning: set `rl` (orpo, dpo, ipo, kto, simpo), or leave it out."
    yield from _mapping_flaws(entry)
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


def _unfit_type(entry: DatasetEntry, rl: str | None) -> str:
    """Why a run of this method has no such type, and what to write."""
    name = "a format for preference runs" if isinstance(entry.type, UserPreference) else f"`{entry.type}`"
    if rl is None:
        if is_preference(entry):
            return (
                f"{name} is for preference tuning: set `rl` (orpo, dpo, ipo, kto, simpo), or take a type for "
                f"fine-tuning: {', '.join(TYPES)}."
            )
        return _unknown_type(str(entry.type), TYPES)
    if isinstance(entry.type, UserPrompt):
        return (
            f"this mapping is a prompt for fine-tuning. With `rl: {rl}` a format of your own has {_own_keys(rl)}; or "
            "take rl out."
        )
    columns = "prompt, completion and label" if rl == "kto" else "prompt, chosen and rejected"
    if entry.type in TYPES:
        meant = "`chat_template.default`" if entry.type == "chat_template" else "a mapping with `prompt_format`"
        return (
            f"{name} is for fine-tuning, and with `rl: {rl}` a row has answers to compare: write {meant}, or no "
            f"`type` at all for rows with {columns}; or take rl out."
        )
    return _unknown_type(str(entry.type), PREFERENCE_NAMES)


def _own_keys(rl: str) -> str:
    own = ("field_prompt", "field_system", *(LABEL_FIELDS if rl == "kto" else PAIR_FIELDS), "prompt_format")
    return ", ".join((*own, *(("completion_format",) if rl == "kto" else PAIR_FORMATS)))


def _unknown_type(name: str, known: tuple[str, ...]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    meant = f" Did you mean `{close[0]}`?" if close else ""
    if name.startswith("sharegpt"):
        meant = " Write `chat_template`, which reads from/value as well."
    if known is PREFERENCE_NAMES:
        rest = "a mapping with `prompt_format` for a format of your own; or no `type` at all for rows as in TRL."
    else:
        rest = "a mapping with `format` for a prompt of your own; or no `type` at all for rows that have `input_ids`."
    return f"there is no type `{name}`.{meant} Types: {', '.join(known)}; {rest}"


def _preference_flaws(entry: DatasetEntry, rl: str) -> Iterator[Flaw]:
    read = keys_read(entry, rl)
    optional = frozenset().union(*_READ.values(), _OF_PREFERENCES)
    for name in sorted(optional - read):
        if getattr(entry, name):
            yield (name,), f"{name} does nothing {_why_unread(name, entry, rl)}. Leave it out."
    yield from _mapping_flaws(entry)
    for name in UserPreference.model_fields:
        if _path_of(entry, name) == (name,):
            continue
        if getattr(entry, name):
            yield (name,), f"{name} is in `type` as well: leave out one of the two."
        if rl != "kto" and name in (*LABEL_FIELDS, "completion_format"):
            yield ("type", name), f"{name} is for `rl: kto`; rows of `rl: {rl}` have {_own_keys(rl)}."
    if setting(entry, "completion_format") or setting(entry, "field_completion"):
        for name in (*PAIR_FIELDS, *PAIR_FORMATS):
            if setting(entry, name):
                yield (
                    _path_of(entry, name),
                    f"{name} is for rows with two answers, which become one desirable and one undesirable, and what "
                    "names the completion for rows with one: leave out one of the two.",
                )
    if isinstance(entry.type, UserPreference) or entry.type == "user_defined.default":
        for name, allowed in _PLACES.items():
            if template := setting(entry, name):
                path = _path_of(entry, name)
                broken = list(_template_flaws(path, template, allowed))
                yield from broken
                if not broken and not any(f"{{{place}}}" in template for place in allowed - {"system"}):
                    yield path, f"there is no {{{min(allowed - {'system'})}}} in it, so each row would be the same."


def _path_of(entry: DatasetEntry, name: str) -> tuple[str, ...]:
    """Where a key of a format for preference runs stands: in `type`, or beside it."""
    inside = isinstance(entry.type, UserPreference) and getattr(entry.type, name)
    return ("type", name) if inside else (name,)


_PLACES = {
    "prompt_format": {"prompt", "system"},
    "chosen_format": {"chosen"},
    "rejected_format": {"rejected"},
    "completion_format": {"completion"},
}


def _why_unread(name: str, entry: DatasetEntry, rl: str) -> str:
    if name in (*LABEL_FIELDS, "completion_format") and rl != "kto":
        return f"with `rl: {rl}`, whose rows have a chosen and a rejected answer"
    if name in ("roles_to_train", "train_on_eos", "labels_shifted"):
        return f"with `rl: {rl}`, where the answers are compared, to their ends"
    if name == "train_on_inputs":
        return f"with `rl: {rl}`, which never trains prompts"
    if name == "field_prompt":
        return "with this type; field_messages names the column of the prompt"
    if name in FORMATS:
        return "with this type; it goes with `user_defined.default`"
    return f"with {'rows without a type' if entry.type is None else 'this type'} and `rl: {rl}`"


def _mapping_flaws(entry: DatasetEntry) -> Iterator[Flaw]:
    for part in ("role", "content"):
        name = f"message_field_{part}"
        own = getattr(entry, name)
        if own and entry.message_property_mappings.get(part, own) != own:
            yield (name,), f"message_property_mappings names another {part}: leave out one of the two."


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
    places = {"instruction", "input", "system", "output"}
    broken = list(_template_flaws(("type", "format"), prompt.format, places))
    yield from broken
    if not broken and "{instruction}" not in prompt.format and "{input}" not in prompt.format:
        yield (
            ("type", "format"),
            "there is neither {instruction} nor {input} in it, so each row would be the same.",
        )
    if prompt.no_input_format is not None:
        places = {"instruction", "system", "output"}
        yield from _template_flaws(("type", "no_input_format"), prompt.no_input_format, places)
    if prompt.system_format is not None:
        broken = list(_template_flaws(("type", "system_format"), prompt.system_format, {"system"}))
        yield from broken
        if not broken and "{system}" not in prompt.system_format:
            yield ("type", "system_format"), "there is no {system} in it, so the system text would be lost."


def _template_flaws(path: tuple[str, ...], template: str, allowed: set[str]) -> Iterator[Flaw]:
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
