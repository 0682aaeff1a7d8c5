"""What a script or a notebook says, read from its syntax tree; nothing of it is ever run.

An argument is read where it is a literal, or a name that stands for one: assigned once, in the scope that Python would
look in, and bound by nothing else (a loop, a parameter, an import). All else is text of which nothing is known, and
kept as `Unread`, so that a report can name it.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from luthier.errors import ConfigError

Function = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda


@dataclass(frozen=True, slots=True)
class Unread:
    """An expression that is no literal, as it was written."""

    text: str


@dataclass(slots=True)
class Call:
    """One call: the name of what is called (`FastLanguageModel.from_pretrained`), what it was given, where it is."""

    name: str
    given: dict[str, Any]
    positional: list[Any]
    line: int
    nodes: dict[str, ast.expr] = field(default_factory=dict)
    places: dict[str, int] = field(default_factory=dict)
    unpacked: list[str] = field(default_factory=list)
    """`**` of something that is no literal."""


@dataclass(slots=True)
class Scope:
    """The names of a function or of the module: each with the values that it is bound to, None for what is no value."""

    parent: Scope | None
    bound: dict[str, list[ast.expr | None]] = field(default_factory=dict)

    def value(self, name: str) -> tuple[ast.expr, Scope] | None:
        """What a name stands for if it is assigned once, and the scope that it is assigned in."""
        scope: Scope | None = self
        while scope is not None:
            if name in scope.bound:
                found = scope.bound[name]
                return (found[0], scope) if len(found) == 1 and found[0] is not None else None
            scope = scope.parent
        return None

    def all(self, name: str) -> list[ast.expr]:
        """Every value that a name is assigned, wherever it is bound first."""
        scope: Scope | None = self
        while scope is not None:
            if name in scope.bound:
                return [each for each in scope.bound[name] if each is not None]
            scope = scope.parent
        return []


def read(path: Path) -> tuple[ast.Module, list[str]]:
    """The syntax tree of a script or notebook, and for each of its lines where that is (`x.ipynb, cell 3, line 2`).

    Raises:
        ConfigError: it cannot be read, or is no Python.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such file.") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: it is not UTF-8 ({error.reason}).") from None
    if path.suffix == ".ipynb":
        lines, places = _cells(path, text)
    else:
        lines = text.splitlines()
        places = [f"{path}:{number}" for number in range(1, len(lines) + 1)]
    try:
        return ast.parse("\n".join(_without_magics(lines) if path.suffix == ".ipynb" else lines) + "\n"), places
    except SyntaxError as error:
        at = places[min(max((error.lineno or 1) - 1, 0), len(places) - 1)] if places else str(path)
        raise ConfigError(f"{at}: it is not Python: {error.msg}.") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: it is not Python: {error}.") from None


def _cells(path: Path, text: str) -> tuple[list[str], list[str]]:
    try:
        notebook = json.loads(text)
        cells = notebook["cells"]
        found = [(number, _joined(cell["source"])) for number, cell in enumerate(cells, 1) if _is_code(cell)]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: it is no notebook ({error}).") from None
    lines: list[str] = []
    places: list[str] = []
    for number, source in found:
        if source.lstrip().startswith("%%") and not source.lstrip().startswith(("%%time", "%%capture")):
            continue  # another language: %%bash, %%html
        for row, line in enumerate(source.splitlines(), 1):
            lines.append(line)
            places.append(f"{path}, cell {number}, line {row}")
    return lines, places


def _is_code(cell: Any) -> bool:
    return bool(cell["cell_type"] == "code")


def _joined(source: Any) -> str:
    return source if isinstance(source, str) else "".join(source)


def _without_magics(lines: list[str]) -> list[str]:
    """Notebook commands (`%cd`, `!pip install`, `model?`) as nothing, in as many lines."""
    kept: list[str] = []
    goes_on = False
    for line in lines:
        start = line.lstrip()
        magic = start.startswith(("%", "!", "?")) or (start.endswith("?") and "#" not in start)
        if magic or goes_on:
            kept.append("" if goes_on else f"{line[: len(line) - len(start)]}pass")
            goes_on = start.endswith("\\")
        else:
            kept.append(line)
    return kept


def scopes(tree: ast.Module) -> dict[ast.AST, Scope]:
    """The scope that each call's names are looked up in."""
    found: dict[ast.AST, Scope] = {}
    _visit(tree, Scope(None), found)
    return found


def _visit(node: ast.AST, scope: Scope, found: dict[ast.AST, Scope]) -> None:
    found[node] = scope
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        scope.bound.setdefault(node.name, []).append(None)
    if isinstance(node, Function | ast.ClassDef | ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp):
        scope = Scope(scope)
        if isinstance(node, Function):
            every = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs, node.args.vararg, node.args.kwarg]
            for argument in every:
                if argument is not None:
                    scope.bound.setdefault(argument.arg, []).append(None)
    _bind(node, scope)
    for child in ast.iter_child_nodes(node):
        _visit(child, scope, found)


def _bind(node: ast.AST, scope: Scope) -> None:
    if isinstance(node, ast.Assign):
        for target in node.targets:
            _bind_target(target, node.value, scope)
    elif isinstance(node, ast.AnnAssign | ast.NamedExpr) and node.value is not None:
        _bind_target(node.target, node.value, scope)
    elif isinstance(node, ast.AugAssign | ast.For | ast.AsyncFor | ast.comprehension):
        _bind_target(node.target, None, scope)
    elif isinstance(node, ast.withitem) and node.optional_vars is not None:
        _bind_target(node.optional_vars, None, scope)
    elif isinstance(node, ast.Delete):
        for target in node.targets:
            _bind_target(target, None, scope)
    elif isinstance(node, ast.ExceptHandler) and node.name:
        scope.bound.setdefault(node.name, []).append(None)
    elif isinstance(node, ast.Import | ast.ImportFrom):
        for alias in node.names:
            scope.bound.setdefault(alias.asname or alias.name.split(".")[0], []).append(None)
    elif isinstance(node, ast.Global | ast.Nonlocal):
        for name in node.names:
            scope.bound.setdefault(name, []).append(None)


def _bind_target(target: ast.expr, value: ast.expr | None, scope: Scope) -> None:
    if isinstance(target, ast.Name):
        scope.bound.setdefault(target.id, []).append(value)
    elif isinstance(target, ast.Tuple | ast.List):
        pairs = isinstance(value, ast.Tuple | ast.List) and len(value.elts) == len(target.elts)
        for number, each in enumerate(target.elts):
            # `model, tokenizer = from_pretrained(...)`: both come from the call.
            part = value.elts[number] if pairs and isinstance(value, ast.Tuple | ast.List) else value
            _bind_target(each, part, scope)
    elif isinstance(target, ast.Starred):
        _bind_target(target.value, None, scope)
    elif isinstance(target, ast.Subscript | ast.Attribute) and isinstance(target.value, ast.Name):
        # `settings["lr"] = ...` changes what the name stands for.
        scope.bound.setdefault(target.value.id, []).append(None)


def calls(tree: ast.Module) -> Iterator[Call]:
    """Every call of something that has a name, in the order of the text."""
    scope_of = scopes(tree)
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    for node in sorted(nodes, key=lambda each: (each.lineno, each.col_offset)):
        name = _dotted(node.func)
        if name is None:
            continue
        scope = scope_of[node]
        positional = [literal(argument, scope) for argument in node.args]
        call = Call(name, {}, positional, node.lineno)
        for keyword in node.keywords:
            if keyword.arg is not None:
                call.given[keyword.arg] = literal(keyword.value, scope)
                call.nodes[keyword.arg] = keyword.value
                call.places[keyword.arg] = keyword.value.lineno
                continue
            unpacked = literal(keyword.value, scope)
            if isinstance(unpacked, dict) and all(isinstance(key, str) for key in unpacked):
                call.given |= unpacked
                call.places |= dict.fromkeys(unpacked, keyword.value.lineno)
            else:
                call.unpacked.append(ast.unparse(keyword.value))
        yield call


def literal(node: ast.expr, scope: Scope, depth: int = 0) -> Any:
    """The value of a literal, or of a name that stands for one; else `Unread`."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str | int | float | bool | None) else Unread(ast.unparse(node))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        value = literal(node.operand, scope, depth)
        if isinstance(value, int | float) and not isinstance(value, bool):
            return -value if isinstance(node.op, ast.USub) else value
    elif isinstance(node, ast.List | ast.Tuple):
        items = [literal(item, scope, depth) for item in node.elts]
        if not any(isinstance(item, Unread) for item in items):
            return items
    elif isinstance(node, ast.Dict) and all(key is not None for key in node.keys):
        both = zip(node.keys, node.values, strict=True)
        pairs = [(literal(key, scope, depth), literal(value, scope, depth)) for key, value in both if key]
        if not any(isinstance(part, Unread | list | dict) for part, _ in pairs):
            return dict(pairs)
    elif isinstance(node, ast.Attribute) and _dotted(node) in _DTYPES:
        return node.attr
    elif isinstance(node, ast.Name) and depth < 20 and (found := scope.value(node.id)) is not None:
        value = literal(*found, depth + 1)
        if not isinstance(value, Unread):
            return value
    return Unread(ast.unparse(node))


_DTYPES = {f"torch.{name}" for name in ("float16", "bfloat16", "float32", "half")}


def _dotted(node: ast.expr) -> str | None:
    """`a.b.c` as text; of a method of a call (`f(x).map`) the name of the method alone."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        before = _dotted(node.value)
        return f"{before}.{node.attr}" if before else node.attr
    return None
