"""From rows with messages to conversations in the form that chat templates take.

Datasets write the same thing in many ways: `messages` with `role` and `content`, `conversations` with `from`
and `value`, roles called human and gpt, tool calls and their arguments as objects or as JSON in a string. All
of it becomes the form of transformers' `apply_chat_template`; what cannot be expressed in it (images, unknown
roles, two different system texts) is an error rather than a guess.
"""

from __future__ import annotations

import json
from collections import Counter
from functools import lru_cache
from typing import Any

from luthier.config.datasets import DatasetEntry
from luthier.data.examples import ChatExample
from luthier.data.values import Row, fields_of, optional_text, shortened, text_of, type_name
from luthier.errors import DataError

ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_call": "assistant",
    "developer": "developer",
    "ipython": "ipython",
}
"""Role names of datasets, and those that templates have for them. `function_call` is a turn that calls a
tool."""

EMPTY_ANSWERS = "empty answers, of which only the end is trained"

_TRAIN_FLAGS = ("train", "training", "weight")
_TRAIN_DETAILS = ("training_detail", "train_detail")


def chat_columns(entry: DatasetEntry) -> frozenset[str]:
    """Columns that are read: messages, tools, and the system text."""
    messages = {entry.field_messages} if entry.field_messages else {"messages", "conversations"}
    return frozenset({*messages, entry.field_tools or "tools", entry.field_system or "system"})


def chat_example(row: Row, entry: DatasetEntry, notes: Counter[str]) -> ChatExample:
    """The conversation of a row. Raises DataError that names the message."""
    field, given = _messages_of(row, entry)
    messages = read_messages(given, field, entry, notes)
    system = optional_text(row, entry.field_system or "system", notes)
    if system:
        put_system(messages, system, entry.field_system or "system")
    return ChatExample(messages, tools_of(row, entry.field_tools or "tools"))


def read_messages(
    given: list[Any], field: str, entry: DatasetEntry, notes: Counter[str]
) -> list[dict[str, Any]]:
    """Messages of a column, by the entry's names of their parts and roles. Raises DataError that names the message."""
    roles = _role_names(tuple((name, tuple(aliases)) for name, aliases in entry.roles.items()))
    named = {"role": entry.message_field_role, "content": entry.message_field_content}
    mappings = {**entry.message_property_mappings, **{name: column for name, column in named.items() if column}}
    messages = []
    for number, message in enumerate(given, start=1):
        where = f"message {number} of `{field}`"
        if not isinstance(message, dict):
            raise DataError(f"{where} must be an object, and is {type_name(message)}")
        messages.append(_message(message, mappings, roles, where, notes))
    return messages


def _messages_of(row: Row, entry: DatasetEntry) -> tuple[str, list[Any]]:
    if entry.field_messages:
        field = entry.field_messages
    else:
        field = "conversations" if row.get("messages") is None and "conversations" in row else "messages"
    value = row.get(field)
    if value is None:
        problem = "is null" if field in row else "is missing"
        raise DataError(f"`{field}` {problem}; {fields_of(row)}")
    if isinstance(value, str):
        value = _from_json(value, f"`{field}`")
    if not isinstance(value, list):
        raise DataError(
            f"`{field}` must be a list of messages, and is {type_name(value)}: {shortened(value)}"
        )
    if not value:
        raise DataError(f"`{field}` has no message")
    return field, value


@lru_cache(maxsize=64)
def _role_names(own: tuple[tuple[str, tuple[str, ...]], ...]) -> dict[str, str]:
    named = {alias: name for name, aliases in own for alias in aliases}
    return {**ROLES, **{name: name for name, _ in own}, **named}


def _message(
    given: dict[str, Any], mappings: dict[str, str], roles: dict[str, str], where: str, notes: Counter[str]
) -> dict[str, Any]:
    # What a dataset says by null is what others say by leaving it out.
    message = {name: value for name, value in given.items() if value is not None}
    for name, column in (mappings or _usual_names(message)).items():
        if column in message and column != name:
            message[name] = message.pop(column)
        elif column not in message and name in message and name in ("role", "content"):
            raise DataError(
                f"{where} has `{name}` and no `{column}`, which `message_property_mappings` says is its {name}"
            )
    role = message.get("role")
    if not isinstance(role, str):
        raise DataError(f"{where} has no role; it has: {', '.join(given)}. See `message_property_mappings`")
    if role not in roles:
        known = ", ".join(sorted(roles))
        raise DataError(
            f"{where} has the role {role!r}, which is none of {known}; say what it is with `roles`, "
            f"such as `roles: {{assistant: [{role}]}}`"
        )
    message["role"] = roles[role]
    if role == "function_call" and roles[role] == "assistant":
        message["tool_calls"] = message.pop("content", None)
    if "tool_calls" in message:
        message["tool_calls"] = _tool_calls(message["tool_calls"], where)
        if not message["tool_calls"]:
            del message["tool_calls"]
    message["content"] = _content(message, where, given, notes)
    _set_train_flag(message, where)
    return message


def _usual_names(message: dict[str, Any]) -> dict[str, str]:
    """ShareGPT's names, where the usual ones are absent."""
    names = {}
    if "role" not in message and "from" in message:
        names["role"] = "from"
    if "content" not in message and "value" in message:
        names["content"] = "value"
    return names


def _content(message: dict[str, Any], where: str, given: dict[str, Any], notes: Counter[str]) -> str:
    content = message.get("content")
    if content is None:
        if "tool_calls" in message or message.get("reasoning_content"):
            return ""
        raise DataError(f"{where} ({message['role']}) has no content; it has: {', '.join(given)}")
    if isinstance(content, list):
        content = "".join(_text_part(part, where, notes) for part in content)
    text = text_of(content, f"content of {where}", notes)
    if not text and message["role"] == "assistant" and "tool_calls" not in message:
        notes[EMPTY_ANSWERS] += 1
    return text


def _text_part(part: Any, where: str, notes: Counter[str]) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, dict) and part.get("type", "text") == "text" and "text" in part:
        return text_of(part["text"], f"content of {where}", notes)
    kind = part.get("type") if isinstance(part, dict) else type_name(part)
    raise DataError(f"content of {where} has a part that is not text ({kind}); only text can be trained")


def _set_train_flag(message: dict[str, Any], where: str) -> None:
    """Turn `train`, `training` or `weight` (0 or 1) into `train`: true or false."""
    detail = next((name for name in _TRAIN_DETAILS if name in message), None)
    if detail:
        raise DataError(
            f"{where} has `{detail}`: parts of a message cannot be trained on their own; use `type: "
            "input_output`"
        )
    flags = {name: message.pop(name) for name in _TRAIN_FLAGS if name in message}
    for name, flag in flags.items():
        if flag not in (True, False):
            raise DataError(f"{where}: `{name}` must be true or false (0 or 1), not {flag!r}")
    if len({bool(flag) for flag in flags.values()}) > 1:
        raise DataError(f"{where}: {' and '.join(f'`{name}`' for name in flags)} contradict each other")
    if flags:
        message["train"] = bool(next(iter(flags.values())))


def put_system(messages: list[dict[str, Any]], system: str, field: str) -> None:
    """Put a row's system text before its messages. Raises DataError where they have another one."""
    first = messages[0]
    if first["role"] not in ("system", "developer"):
        messages.insert(0, {"role": "system", "content": system})
    elif first["content"] != system:
        raise DataError(f"the row has two different system texts: `{field}`, and its first message")


# --- tools --------------------------------------------------------------------------------------------------


def _tool_calls(value: Any, where: str) -> list[dict[str, Any]]:
    what = f"tool call in {where}"
    if isinstance(value, str):
        value = _from_json(value, what) if value.strip() else []
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        raise DataError(f"{what} must be an object or a list of them, and is {type_name(value)}")
    return [_tool_call(call, what) for call in value]


def _tool_call(call: Any, what: str) -> dict[str, Any]:
    """`{"type": "function", "function": {"name", "arguments": object}}`, which is what templates read."""
    if isinstance(call, str):
        call = _from_json(call, what)
    if not isinstance(call, dict):
        raise DataError(f"{what} must be an object, and is {type_name(call)}")
    inner = call.get("function") if isinstance(call.get("function"), dict) else call
    assert isinstance(inner, dict)
    name, arguments = inner.get("name"), inner.get("arguments", inner.get("parameters"))
    if not isinstance(name, str):
        raise DataError(f"{what} has no `name`; it has: {', '.join(inner)}")
    if isinstance(arguments, str):
        arguments = _from_json(arguments, f"`arguments` of the {what}") if arguments.strip() else {}
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, dict):
        raise DataError(f"`arguments` of the {what} must be an object, and is {type_name(arguments)}")
    outer = {key: value for key, value in call.items() if key in ("id", "type") and value is not None}
    return {"type": "function", **outer, "function": {"name": name, "arguments": arguments}}


def tools_of(row: Row, field: str) -> list[dict[str, Any]] | None:
    """The tools of a row, as templates take them; None where it has none."""
    value = row.get(field)
    if isinstance(value, str):
        value = _from_json(value, f"`{field}`") if value.strip() else None
    if value is None or value == []:
        return None
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        raise DataError(f"`{field}` must be a list of tools, and is {type_name(value)}: {shortened(value)}")
    return [_tool(tool, f"tool {number} of `{field}`") for number, tool in enumerate(value, start=1)]


def _tool(tool: Any, what: str) -> dict[str, Any]:
    if isinstance(tool, str):
        tool = _from_json(tool, what)
    inner = tool.get("function", tool) if isinstance(tool, dict) else None
    if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
        raise DataError(f"{what} must be the description of a function, with a `name`: {shortened(tool)}")
    if isinstance(inner.get("parameters"), str):
        inner = {**inner, "parameters": _from_json(inner["parameters"], f"`parameters` of {what}")}
    return {**tool, "function": inner} if "function" in tool else {"type": "function", "function": inner}


def _from_json(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{what} is text that is not valid JSON ({error}): {shortened(text)}") from error
