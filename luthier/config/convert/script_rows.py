"""Which rows a script trains on: what `load_dataset` was given, and what the program makes of a row where that is one
of two forms that most notebooks have. Everything else that changes rows is named, and not read.

    conversations   a function that hands a column to `apply_chat_template`
    a prompt        a function that fills a text with `{}` in it from columns
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import dataclass, field
from string import Formatter
from typing import Any

from luthier.config.convert import script_keys as keys
from luthier.config.convert.conversion import READERS, Conversion, split_and_count
from luthier.config.convert.syntax import Call, Unread, literal, scopes

_ROWS = "train_dataset"
_HARMLESS = {"shuffle", "standardize_sharegpt", "standardize_data_formats", "to_list", "flatten_indices"}
_CHANGES = {
    "map", "filter", "select", "rename_column", "rename_columns", "remove_columns", "from_list", "from_dict",
    "from_pandas", "from_generator", "concatenate_datasets", "interleave_datasets", "add_column", "take", "skip",
}  # fmt: skip


@dataclass(slots=True)
class _Trace:
    """What an expression is made from: calls of load_dataset, calls that change rows, a split's name."""

    loads: list[ast.Call] = field(default_factory=list)
    changes: list[ast.Call] = field(default_factory=list)
    parts: list[ast.Call] = field(default_factory=list)
    split: str | None = None


class _Reader:
    def __init__(self, into: Conversion, tree: ast.Module, at: Callable[[int], str]) -> None:
        self.into, self.tree, self.at = into, tree, at
        self.scope_of = scopes(tree)

    def trace(self, node: ast.expr) -> _Trace:
        """Follow an expression and the names in it back to where rows are loaded."""
        trace = _Trace()
        seen: set[ast.AST] = set()
        waiting = [node]
        while waiting:
            each = waiting.pop()
            if each in seen:
                continue
            seen.add(each)
            if isinstance(each, ast.Name):
                waiting += self.scope_of[each].all(each.id)
                continue
            part = each.slice if isinstance(each, ast.Subscript) else None
            if trace.split is None and isinstance(part, ast.Constant) and isinstance(part.value, str):
                trace.split = part.value
            if isinstance(each, ast.Call):
                name = _last(each.func)
                if name == "load_dataset":
                    trace.loads.append(each)
                    continue
                if name == "train_test_split":
                    trace.parts.append(each)
                elif name in _CHANGES:
                    trace.changes.append(each)
                if isinstance(each.func, ast.Attribute):
                    waiting.append(each.func.value)
                waiting += [argument for argument in each.args if name not in ("map", "filter")]
                continue
            waiting += [child for child in ast.iter_child_nodes(each) if isinstance(child, ast.expr)]
        return trace

    def entry(self, load: ast.Call, split: str | None) -> dict[str, Any] | None:
        """An entry of datasets from a call of load_dataset; what is not read of it is said."""
        scope = self.scope_of[load]
        given = dict(zip(("path", "name"), (literal(each, scope) for each in load.args), strict=False))
        given |= {each.arg: literal(each.value, scope) for each in load.keywords if each.arg}
        theirs = "load_dataset"
        self.into.places[theirs] = self.at(load.lineno)
        unread = [f"{name}={value.text}" for name, value in given.items() if isinstance(value, Unread)]
        if unread or any(each.arg is None for each in load.keywords):
            self.into.unsupported(theirs, f"not read: {', '.join(unread) or '**'}: write datasets into the result.")
            return None
        given = {name: value for name, value in given.items() if value is not None}
        files, where = given.get("data_files"), str(given.get("split") or split or "train")
        if isinstance(files, dict):
            files = files.get(where.split("[")[0], next(iter(files.values()), None))
        if given.get("path") in READERS and files:
            first, *more = files if isinstance(files, list) else [files]
            if more:
                self.into.unsupported(theirs, "several data_files: write an entry of datasets for each.")
                return None
            entry: dict[str, Any] = {"path": first}
            where = f"train{where[where.index('['):] if '[' in where else ''}"  # a file has no other
        else:
            entry = {name: given[name] for name in ("path", "name", "revision") if name in given}
            if files:
                entry["data_files"] = files
        if (part := split_and_count(where)) is None:
            self.into.unsupported(theirs, f"split {where!r}: only the first rows can be taken ([:1000]).")
            return None
        name, count = part
        if count is not None:
            entry["path"] += f"#{count}"
        if name != "train":
            entry["split"] = name
        rest_of = set(given) - {"path", "name", "revision", "data_files", "split"}
        for unknown in sorted(rest_of):
            self.into.no_effect(f"{theirs}({unknown})", "rows are read by the run itself")
        return entry


def datasets(into: Conversion, tree: ast.Module, found: list[Call], at: Callable[[int], str]) -> None:
    """`datasets` and `test_datasets`, from what the trainer was given, or else from all that is loaded."""
    reader = _Reader(into, tree, at)
    trainer = next((call for call in found if call.name.rpartition(".")[2] in keys.TRAINERS), None)
    nodes = trainer.nodes if trainer is not None else {}
    trace = reader.trace(nodes[_ROWS]) if _ROWS in nodes else _Trace()
    if not trace.loads:
        trace.loads = [
            node for node in ast.walk(tree) if isinstance(node, ast.Call) and _last(node.func) == "load_dataset"
        ][:1]
    if trainer is not None:
        into.places[_ROWS] = at(trainer.line)
    if not trace.loads:
        into.unsupported(_ROWS, "there is no load_dataset(...): give datasets with path and type.", essential=True)
        return
    reading = _Kind(reader, found, trace)
    kind = reading.read()
    rows = [entry | kind for load in trace.loads if (entry := reader.entry(load, _split(trace))) is not None]
    for row in rows:
        if reading.count is not None and "#" not in row["path"]:
            row["path"] += f"#{reading.count}"
    if rows:
        into.values["datasets"] = rows
        into.carried("load_dataset", f"datasets: {', '.join(str(row['path']) for row in rows)}")
    _validation(into, reader, nodes, trace, kind)


def _split(trace: _Trace) -> str | None:
    return None if trace.parts else trace.split


def _validation(
    into: Conversion, reader: _Reader, nodes: dict[str, ast.expr], rows: _Trace, kind: dict[str, Any]
) -> None:
    node = nodes.get("eval_dataset")
    if node is None or (isinstance(node, ast.Constant) and node.value is None):
        return
    trace = reader.trace(node)
    for part in trace.parts or rows.parts:
        sizes = [literal(each.value, reader.scope_of[part]) for each in part.keywords if each.arg == "test_size"]
        size = sizes[0] if sizes else 0.25  # what `datasets` takes
        if isinstance(size, int | float):
            into.carry("train_test_split(test_size)", "val_set_size", size)
            return
    entries = [entry | kind for load in trace.loads if (entry := reader.entry(load, trace.split)) is not None]
    if entries and entries != into.values.get("datasets"):
        into.values["test_datasets"] = entries
        into.carried("eval_dataset", "test_datasets")
    else:
        into.unsupported("eval_dataset", "not read: give test_datasets or val_set_size.")


class _Kind:
    """What a row is: the type of the entry and its columns."""

    def __init__(self, reader: _Reader, found: list[Call], trace: _Trace) -> None:
        self.into = reader.into
        self.reader = reader
        self.trace = trace
        given = {name: value for call in found if call.name.rpartition(".")[2] in keys.CALLS
                 for name, value in call.given.items()}  # fmt: skip
        self.text_field = given.get("dataset_text_field")
        names = {call.name.rpartition(".")[2] for call in found}
        self.answers_only = "train_on_responses_only" in names or given.get("assistant_only_loss") is True
        self.count: int | None = None
        self.chat = "get_chat_template" in names
        for name in ("dataset_text_field", "assistant_only_loss", "completion_only_loss"):
            if name in given:
                self.into.carried(name, "the type of datasets")

    def read(self) -> dict[str, Any]:
        """The keys of an entry that say it."""
        kind: dict[str, Any] | None = None
        for change in self.trace.changes:
            found = self._of_function(change)
            kind = kind if found is None else found
        if self.into.values.get("rl") is not None:
            return {}
        if kind is None and isinstance(self.text_field, str) and not self.trace.changes and not self.chat:
            kind = {"type": "completion"}
            if self.text_field != "text":
                kind["field"] = self.text_field
            if self.answers_only:
                self.into.unsupported("train_on_responses_only", "of rows of finished text all tokens are trained.")
            return kind
        if kind is None:
            kind = {"type": "chat_template"}
            self.into.check("datasets", "what a row is cannot be read: taken for conversations (type: chat_template)")
        if not self.answers_only:
            self.into.values["train_on_inputs"] = True
            self.into.carried("train_on_inputs", "true: without train_on_responses_only all tokens are trained")
        return kind

    def _of_function(self, change: ast.Call) -> dict[str, Any] | None:
        """The kind of rows that a change makes, if it is a function in one of the two forms."""
        text = ast.unparse(change.func)
        shown = f"{text.rpartition('.')[2]}({', '.join(ast.unparse(each) for each in change.args)[:60]})"
        self.into.places[shown] = self.reader.at(change.lineno)
        function = self._function(change) if _last(change.func) == "map" else None
        kind = None
        if function is not None:
            kind = self._conversations(function)
            kind = self._prompt(function) if kind is None else kind
        elif (count := _first(change)) is not None:
            self.into.carried(shown, f"path: ...#{count}")
            self.into.check(shown, f"the first {count} rows of the data are taken, in its own order")
            self.count = count if self.count is None else min(self.count, count)
            return None
        if kind is None:
            self.into.unsupported(shown, "not read: code that makes rows is not run: write the type of datasets.")
        else:
            named = kind.get("type", "none: conversations go through the chat template")
            self.into.carried(shown, f"type: {named if isinstance(named, str) else 'a prompt of its own'}")
        return kind

    def _function(self, change: ast.Call) -> ast.FunctionDef | None:
        name = change.args[0].id if change.args and isinstance(change.args[0], ast.Name) else None
        every = [node for node in ast.walk(self.reader.tree) if isinstance(node, ast.FunctionDef) and node.name == name]
        return every[0] if len(every) == 1 and every[0].args.args else None

    def _conversations(self, function: ast.FunctionDef) -> dict[str, Any] | None:
        calls = [node for node in ast.walk(function) if isinstance(node, ast.Call)]
        renders = [call for call in calls if _last(call.func) == "apply_chat_template"]
        columns = sorted(set(_columns(function).values()))
        if self.into.values.get("rl") is not None:
            rendered = {_column(call.args[0], function) for call in renders if call.args}
            return {} if renders and rendered <= _PREFERENCE else None
        if not renders or len(columns) != 1:
            return None
        [column] = columns
        return {"type": "chat_template"} | ({} if column == "messages" else {"field_messages": column})

    def _prompt(self, function: ast.FunctionDef) -> dict[str, Any] | None:
        """`TEXT.format(a, b, c)`, with `a`, `b` and `c` from columns, of which the last is the answer."""
        fills = [
            node
            for node in ast.walk(function)
            if isinstance(node, ast.Call) and _last(node.func) == "format" and isinstance(node.func, ast.Attribute)
        ]
        if len(fills) != 1 or fills[0].keywords:
            return None
        [fill] = fills
        assert isinstance(fill.func, ast.Attribute)
        template = literal(fill.func.value, self.reader.scope_of[fill])
        columns = _columns(function)
        named = [columns.get(each.id) if isinstance(each, ast.Name) else None for each in fill.args]
        if not isinstance(template, str) or None in named or len(named) not in (2, 3):
            return None
        places = ["instruction", "output"] if len(named) == 2 else ["instruction", "input", "output"]
        try:
            parts = list(Formatter().parse(template))
        except ValueError:
            return None
        if [part[1] for part in parts if part[1] is not None] != [""] * len(places) or parts[-1][1] is None:
            return None  # other places than {}, or text behind the answer
        return {"type": {"format": template.format(*(f"{{{place}}}" for place in places))} | {
            f"field_{place}": str(column) for place, column in zip(places, named, strict=True)
        }}  # fmt: skip


_PREFERENCE = {"prompt", "chosen", "rejected", "completion"}


def _first(change: ast.Call) -> int | None:
    """N of `select(range(N))`."""
    inner = change.args[0] if change.args else None
    if _last(change.func) != "select" or not isinstance(inner, ast.Call) or _last(inner.func) != "range":
        return None
    count = inner.args[0] if len(inner.args) == 1 else None
    return count.value if isinstance(count, ast.Constant) and isinstance(count.value, int) else None


def _column(node: ast.expr, function: ast.FunctionDef) -> str | None:
    """`x` of `rows["x"]`, where `rows` is what the function is given."""
    if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name) and isinstance(node.slice, ast.Constant):
        value = node.slice.value
        return value if node.value.id == function.args.args[0].arg and isinstance(value, str) else None
    return None


def _columns(function: ast.FunctionDef) -> dict[str, str]:
    """Names in a function, and the columns of its rows that they stand for: `a = rows["a"]`, and loops over those."""
    found: dict[str, str] = {}

    def column(node: ast.expr) -> str | None:
        if isinstance(node, ast.Name):
            return found.get(node.id)
        return _column(node, function)

    def bind(target: ast.expr, value: ast.expr) -> None:
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Call) and _last(value.func) == "zip":
            for each, item in zip(target.elts, value.args, strict=False):
                bind(each, item)
        elif isinstance(target, ast.Name) and (name := column(value)) is not None:
            found[target.id] = name

    for node in ast.walk(function):
        if isinstance(node, ast.Assign):
            for target in node.targets:
                bind(target, node.value)
        elif isinstance(node, ast.For | ast.comprehension):
            bind(node.target, node.iter)
    return found


def _last(node: ast.expr) -> str | None:
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else None
