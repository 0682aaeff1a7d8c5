"""`"=2*lora_r"`: a value of a run that follows from others, by arithmetic over the keys of its config.

The text is parsed as Python's expressions are and the tree is walked here, so that nothing but numbers, names of keys,
signs of arithmetic and a few functions can stand in it. A whole result is an integer.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable
from typing import Any

from luthier.config.names import nearest
from luthier.config.schema import FIELDS

SIGN = "="

_OPERATORS: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "min": min, "max": max, "round": round, "abs": abs, "int": int, "sqrt": math.sqrt,
}  # fmt: skip
_LONGEST = 200
# A larger exponent would only be a slip, and `9**9**9` computes for hours.
_LARGEST_EXPONENT = 64

Lookup = Callable[[str], Any]


class ExpressionError(ValueError):
    """What is wrong with an expression, in a sentence."""


def is_expression(value: Any) -> bool:
    """Whether a value of a study is to be computed."""
    return isinstance(value, str) and value.startswith(SIGN)


def names_in(text: str) -> set[str]:
    """The keys that an expression reads. Raises ExpressionError for one that cannot be parsed."""
    tree = _parsed(text)
    called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and id(node) not in called}


def follows_itself(key: str, value: Any) -> bool:
    """Whether a key's value is computed from the base's value of that key, and of nothing else."""
    if not is_expression(value):
        return False
    try:
        return names_in(value) == {key}
    except ExpressionError:
        return False


def evaluate(text: str, lookup: Lookup) -> int | float:
    """The number that an expression comes to.

    Args:
        text: begins with `=`. lookup: the value of a key in this run.

    Raises:
        ExpressionError: it is none, reads what is no number, or has no finite result.
    """
    try:
        result = _value(_parsed(text).body, lookup, text)
    except ZeroDivisionError:
        raise ExpressionError(f"{text} divides by zero.") from None
    except (OverflowError, ValueError, TypeError) as error:
        if isinstance(error, ExpressionError):
            raise
        raise ExpressionError(f"{text} cannot be computed: {error}.") from None
    if isinstance(result, complex) or not math.isfinite(result):
        raise ExpressionError(f"{text} comes to {result}, which is no number for a config.")
    whole = isinstance(result, int) or (result.is_integer() and abs(result) < 2**53)
    return int(result) if whole else float(result)


def _parsed(text: str) -> ast.Expression:
    if len(text) > _LONGEST:
        raise ExpressionError(f"an expression has at most {_LONGEST} characters; this one has {len(text)}.")
    try:
        return ast.parse(text[len(SIGN) :].strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise ExpressionError(f"{text} is no arithmetic; write such as `=2*lora_r`.") from None


def _value(node: ast.expr, lookup: Lookup, text: str) -> Any:
    match node:
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
            return number
        case ast.Name(id=name):
            return _number(name, lookup(_known(name)), text)
        case ast.UnaryOp(op=ast.USub() | ast.UAdd() as sign, operand=inner):
            number = _value(inner, lookup, text)
            return -number if isinstance(sign, ast.USub) else number
        case ast.BinOp(left=left, op=sign, right=right) if type(sign) in _OPERATORS:
            one, other = _value(left, lookup, text), _value(right, lookup, text)
            if isinstance(sign, ast.Pow) and abs(other) > _LARGEST_EXPONENT:
                raise ExpressionError(f"{text}: exponents go to {_LARGEST_EXPONENT}.")
            return _OPERATORS[type(sign)](one, other)
        case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]) if name in _FUNCTIONS:
            return _FUNCTIONS[name](*(_value(argument, lookup, text) for argument in arguments))
    shown = ast.unparse(node)
    functions = ", ".join(_FUNCTIONS)
    raise ExpressionError(
        f"{text}: {shown!r} is not allowed; there are numbers, keys, + - * / // % **, brackets, and {functions}."
    )


def _known(name: str) -> str:
    if name not in FIELDS:
        raise ExpressionError(f"{name} is not a key of the config.{nearest(name, FIELDS)}")
    return name


def _number(name: str, value: Any, text: str) -> int | float:
    if value is None:
        raise ExpressionError(f"{text}: {name} is unset in this run; write it into the base.")
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ExpressionError(f"{text}: {name} is {value!r} in this run, and no number.")
    return value
