"""Checks one value against the type of its key.

Pydantic declares the keys and makes the JSON Schema; the checking of what a user wrote is done here, because
a report for a person needs what pydantic's errors do not carry: one message per value (not one per branch of
a union), in the words of YAML, at the file's line. Nothing is converted beyond what cannot surprise: `3` is a
float where a float is wanted, `1.0` a whole number; a text is never a number, and true/false is neither.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from luthier.config.names import VALUES_ELSEWHERE, nearest, unknown_key
from luthier.config.yaml_source import Path_, dotted

Report = Callable[[Path_, str], None]


class _Invalid:
    """Stands for a value that was reported."""


INVALID: Any = _Invalid()


def check_value(
    annotation: Any, value: Any, path: Path_, report: Report, metadata: Iterable[Any] = ()
) -> Any:
    """The value as its key's type wants it, or `INVALID` after a report; `path` names it in the report."""
    branches, limits = _branches(annotation)
    limits = [*limits, *metadata]
    if value is None and NoneType in branches:
        return None
    containers = [b for b in branches if _fits_container(b, value)]
    if containers:
        best = max(containers, key=lambda branch: _known_keys(branch, value))
        return _check_container(best, value, path, report, limits)
    for branch in branches:
        fitted = _scalar(branch, value)
        if fitted is not INVALID:
            problem = _out_of_range(fitted, limits)
            if problem is None:
                return fitted
            report(path, f"{dotted(path)}: {problem}, found {found(value)}.")
            return INVALID
    report(
        path,
        f"{dotted(path)}: expected {expected(annotation)}, found {found(value)}."
        f"{VALUES_ELSEWHERE.get(f'{dotted(path)}: {value}') or _hint(branches, value)}",
    )
    return INVALID


def check_model(model: type[BaseModel], values: dict[str, Any], path: Path_, report: Report) -> Any:
    """A mapping as the section `model`; unknown and missing keys are reported."""
    clean: dict[str, Any] = {}
    valid = True
    for key, value in values.items():
        if key not in model.model_fields:
            report((*path, key), unknown_key(key, value, model, shown=dotted((*path, key))))
            valid = False
        elif value is not None:  # null is unset
            info = model.model_fields[key]
            clean[key] = check_value(info.annotation, value, (*path, key), report, info.metadata)
            valid = valid and clean[key] is not INVALID
    for key, info in model.model_fields.items():
        if info.is_required() and values.get(key) is None:
            report(path, f"{dotted((*path, key))} is missing: {summary(info)}")
            valid = False
    return model(**clean) if valid else INVALID


def help_of(info: FieldInfo) -> str:
    """A field's help on one line."""
    return " ".join((info.description or "").split())


def summary(info: FieldInfo) -> str:
    """The first sentence of a field's help."""
    return help_of(info).split(". ")[0].rstrip(".") + "."


def accepts_only_text(annotation: Any) -> bool:
    """Whether a value of this type can be nothing but text, so that `revision=123` needs no quotes in a
    shell."""
    return all(b in (str, NoneType) for b in _branches(annotation)[0])


def accepts(annotation: Any, kind: type) -> bool:
    """Whether one branch of the type is `kind`."""
    return kind in _branches(annotation)[0]


def expected(annotation: Any) -> str:
    """A type in the words of a person who writes YAML."""
    branches = _branches(annotation)[0]
    for branch in branches:
        if get_origin(branch) is list and get_args(branch)[0] in branches:
            return f"{expected(get_args(branch)[0])}, or a list of such"
    names: list[str] = []
    for branch in branches:
        names += [name for name in _names(branch) if name not in names]
    if "a whole number" in names and "a number" in names:
        names.remove("a whole number")
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"


def found(value: Any) -> str:
    """A value in the same words."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return f"the number {value}"
    if isinstance(value, str):
        shown = value if len(value) <= 60 else value[:57] + "..."
        return f"the text {shown!r}"
    if isinstance(value, list | tuple):
        return "a list"
    return "a mapping" if isinstance(value, dict) else f"a Python {type(value).__name__}"


def _names(branch: Any) -> list[str]:
    if branch is NoneType:
        return []  # null is possible for every key, so it is no news
    if get_origin(branch) is Literal:
        return [repr(choice).replace("'", "") for choice in get_args(branch)]
    if get_origin(branch) is list:
        inner = _branches(get_args(branch)[0])[0]
        if inner == [str]:
            return ["a list of texts"]
        if inner == [int]:
            return ["a list of whole numbers"]
        if isinstance(inner[0], type) and issubclass(inner[0], BaseModel):
            return ["a list of mappings"]
        return [f"a list of {expected(get_args(branch)[0])}"]
    if get_origin(branch) is dict or (isinstance(branch, type) and issubclass(branch, BaseModel)):
        return ["a mapping"]
    return {bool: ["true", "false"], int: ["a whole number"], float: ["a number"], str: ["text"]}[branch]


def _branches(annotation: Any) -> tuple[list[Any], list[Any]]:
    """The members of a union, unwrapped, and the limits that `Annotated` puts on them."""
    if get_origin(annotation) is Annotated:
        inner, *metadata = get_args(annotation)
        branches, limits = _branches(inner)
        for item in metadata:
            limits += item.metadata if isinstance(item, FieldInfo) else [item]
        return branches, limits
    if get_origin(annotation) in (Union, UnionType):
        branches, limits = [], []
        for member in get_args(annotation):
            inner_branches, inner_limits = _branches(member)
            branches += inner_branches
            limits += inner_limits
        return branches, limits
    return [annotation], []


def _fits_container(branch: Any, value: Any) -> bool:
    if branch is Any:
        return True
    if isinstance(value, list | tuple):
        return get_origin(branch) is list
    if isinstance(value, dict):
        return get_origin(branch) is dict or (isinstance(branch, type) and issubclass(branch, BaseModel))
    return isinstance(value, BaseModel) and branch is type(value)


def _known_keys(branch: Any, value: Any) -> int:
    """How many keys of a mapping a section has: of several sections that may stand here, it is meant for one."""
    if not isinstance(value, dict) or not (isinstance(branch, type) and issubclass(branch, BaseModel)):
        return 0
    return sum(key in branch.model_fields for key in value)


def _check_container(branch: Any, value: Any, path: Path_, report: Report, limits: list[Any]) -> Any:
    if branch is Any or isinstance(value, BaseModel):
        return value
    if get_origin(branch) is list:
        if any(
            isinstance(limit, annotated_types.MinLen) and len(value) < limit.min_length for limit in limits
        ):
            report(path, f"{dotted(path)} is empty; it needs at least one entry.")
            return INVALID
        item_type = get_args(branch)[0]
        items = [check_value(item_type, item, (*path, index), report) for index, item in enumerate(value)]
        return INVALID if any(item is INVALID for item in items) else items
    if get_origin(branch) is dict:
        value_type = get_args(branch)[1]
        pairs = {str(k): check_value(value_type, v, (*path, str(k)), report) for k, v in value.items()}
        return INVALID if any(item is INVALID for item in pairs.values()) else pairs
    return check_model(branch, value, path, report)


def _scalar(branch: Any, value: Any) -> Any:
    """The value if it fits the branch, else `INVALID`."""
    if get_origin(branch) is Literal:
        if value is False and "off" in get_args(branch):
            return "off"  # which YAML reads as false
        fits = any(type(value) is type(choice) and value == choice for choice in get_args(branch))
        return value if fits else INVALID
    if branch is bool or branch is str:
        return value if type(value) is branch else INVALID
    if branch is int and type(value) is float and value.is_integer():
        return int(value)
    if branch is float and type(value) is int:
        return float(value)
    return value if branch in (int, float) and type(value) is branch else INVALID


def _out_of_range(value: Any, limits: list[Any]) -> str | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if not math.isfinite(value):
        return "expected a finite number"
    for limit in limits:
        for kind, attribute, holds, words in _LIMITS:
            bound = getattr(limit, attribute) if isinstance(limit, kind) else None
            if bound is not None and not holds(value, bound):
                return f"has to be {words} {bound}"
    return None


_LIMITS: tuple[tuple[type, str, Callable[[Any, Any], bool], str], ...] = (
    (annotated_types.Gt, "gt", operator.gt, "greater than"),
    (annotated_types.Ge, "ge", operator.ge, "at least"),
    (annotated_types.Lt, "lt", operator.lt, "less than"),
    (annotated_types.Le, "le", operator.le, "at most"),
)


def _hint(branches: list[Any], value: Any) -> str:
    if isinstance(value, bool) and bool not in branches:
        quotes = "; put a text in quotes" if str in branches else ""
        return f" YAML reads yes, no, on and off as true and false{quotes}."
    if isinstance(value, int | float) and not isinstance(value, bool) and str in branches:
        return " Put it in quotes to make it text."
    if isinstance(value, str):
        if (int in branches or float in branches) and _is_number(value):
            return " Leave out the quotes."
        if bool in branches and value.lower() in ("true", "false", "yes", "no", "on", "off"):
            return " Leave out the quotes."
        choices = [c for b in branches if get_origin(b) is Literal for c in get_args(b)]
        if value in map(str, choices):
            return " Leave out the quotes."
        return nearest(value, (choice for choice in choices if isinstance(choice, str)))
    return ""


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
