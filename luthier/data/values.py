"""What may stand in a row's field, and how it is said when something else does."""

from __future__ import annotations

from collections import Counter
from typing import Any

from luthier.errors import DataError

Row = dict[str, Any]


def required(row: Row, field: str, notes: Counter[str]) -> str:
    """The text of a field that every row must have."""
    value = row.get(field)
    if value is None:
        problem = "is null" if field in row else "is missing"
        raise DataError(f"`{field}` {problem}; {fields_of(row)}")
    return text_of(value, f"`{field}`", notes)


def optional_text(row: Row, field: str, notes: Counter[str]) -> str:
    """The text of a field that a row may lack; null counts as lacking."""
    value = row.get(field)
    return "" if value is None else text_of(value, f"`{field}`", notes)


def text_of(value: Any, what: str, notes: Counter[str]) -> str:
    """Text, or a whole number as its digits, which is counted; `what` names the place in errors."""
    if isinstance(value, str):
        if not value.isascii():
            _check_surrogates(value, what)
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        notes["whole numbers where text belongs, taken as their digits"] += 1
        return str(value)
    raise DataError(f"{what} must be text, and is {type_name(value)}: {shortened(value)}")


def _check_surrogates(value: str, what: str) -> None:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{what} holds half of a surrogate pair (\\u{ord(value[error.start]):04x} at character "
            f"{error.start + 1}), which is no character: the text was cut in two, or written by a broken "
            "encoder"
        ) from error


def fields_of(row: Row) -> str:
    """Names of the row's fields, for messages."""
    return f"the row has the fields: {', '.join(row)}" if row else "the row has no fields"


def type_name(value: Any) -> str:
    names = {type(None): "null", bool: "true or false", float: "a number with a fraction", int: "a number",
             list: "a list", dict: "an object", str: "text"}  # fmt: skip
    return names.get(type(value), f"of type {type(value).__name__}")


def shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
