"""YAML to Python values, with the line of every value kept.

PyYAML's safe loader is the base; what differs from it is there to keep a user's slip from becoming a wrong
value: a key written twice is an error, `5e-5` is a number, and dates, sexagesimal numbers (`1:30`) and
numbers with a leading zero stay text. Problems are collected, so that one report can hold all of them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

Path_ = tuple[str | int, ...]


def dotted(path: Path_) -> str:
    """`datasets.0.path`, as on the command line."""
    return ".".join(str(part) for part in path)


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong: where it stands (`cfg.yml:12`, `command line`), and what to do about it."""

    where: str
    message: str


@dataclass(slots=True)
class Source:
    """The values that a file gave, and where each of them (by its path of keys and indices) was written."""

    name: str
    values: dict[str, Any] = field(default_factory=dict)
    lines: dict[Path_, int] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def where(self, path: Path_) -> str:
        """The place of the value at `path`, or of the nearest thing around it that has one."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.lines:
                return f"{self.name}:{self.lines[path[:length]]}"
        return self.name

    def report(self, message: str, line: int | None = None) -> None:
        """Add a problem of the source itself, at a line where it has one."""
        self.problems.append(Problem(self.name if line is None else f"{self.name}:{line}", message))


class _Loader(yaml.SafeLoader):
    """The safe loader with the number formats of YAML 1.2."""


# A copy: the resolver table is shared with SafeLoader, which other packages use.
_Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if not tag.endswith((":int", ":float", ":timestamp"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int",
    re.compile(r"^[-+]?(?:0|[1-9][0-9]*(?:_[0-9]+)*|0x[0-9a-fA-F]+)$"),
    list("-+0123456789"),
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^(?:[-+]?(?:[0-9]+(?:_[0-9]+)*)?\.[0-9]+(?:[eE][-+]?[0-9]+)?|[-+]?[0-9]+\.(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?[0-9]+[eE][-+]?[0-9]+|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
    list("-+.0123456789"),
)


def parse_scalar(text: str) -> Any:
    """A value from the command line. Raises `yaml.YAMLError` if it is no YAML."""
    return yaml.load(text, Loader=_Loader)


def read_file(path: str | Path) -> Source:
    """Read a config file; everything that is wrong with it as a file is in the result's `problems`."""
    source = Source(str(path))
    try:
        raw = Path(path).read_bytes()
    except FileNotFoundError:
        # `luthier train --lora_r 8 cfg.yml` takes the first argument for the file.
        first = str(path).startswith("-") or "=" in str(path)
        source.report(
            "there is no such file." + (" The config comes first, overrides follow." if first else "")
        )
        return source
    except IsADirectoryError:
        source.report("this is a folder; name a YAML file.")
        return source
    except OSError as error:
        source.report(f"cannot be read: {error.strerror}.")
        return source
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        source.report(f"byte 0x{raw[error.start]:02x} is not UTF-8; save the file as UTF-8.", line)
        return source
    _read_text(text, source)
    return source


def _read_text(text: str, source: Source) -> None:
    loader: _Loader | None = None
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
        if root is None:
            source.report("the file is empty; a config needs at least base_model and datasets.")
        elif not isinstance(root, yaml.MappingNode):
            source.report("a config is a mapping, with lines such as `base_model: NAME`; this is not one.")
        else:
            source.values = _Builder(loader, source).mapping(root, ())
    except RecursionError:
        source.report("brackets are nested too deeply to be read.")
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        source.report(f"the character U+{ord(text[error.position]):04X} may not stand in YAML.", line)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        source.report(_syntax_message(error, text), mark.line + 1 if mark else None)
    finally:
        if loader is not None:
            loader.dispose()


def _syntax_message(error: yaml.MarkedYAMLError, text: str) -> str:
    problem = error.problem or error.context or "not YAML"
    mark = error.problem_mark
    written = text[mark.index - mark.column :].split("\n", 1)[0] if mark is not None else ""
    if "\t" in written[: len(written) - len(written.lstrip())] or "'\\t'" in problem:
        return "a tab stands where YAML wants spaces; indent with spaces."
    if "expected a single document" in (error.context or ""):
        return "a second YAML document (`---`) begins here; a config is one document."
    context = f" {error.context}" if error.context and error.problem else ""
    hint = ""
    if "mapping values are not allowed" in problem:
        hint = " Text that holds `: ` needs quotes; check the indentation too."
    elif "could not find expected ':'" in problem:
        hint = " A colon with a space after it is missing here or in the line before."
    return f"not valid YAML:{context}: {problem}.{hint}".replace("::", ":")


_COLLECTIONS = ("tag:yaml.org,2002:seq", "tag:yaml.org,2002:map")


class _Builder:
    """Turns YAML nodes into plain values and writes down each one's line."""

    def __init__(self, loader: _Loader, source: Source) -> None:
        self.loader = loader
        self.source = source
        self.open: set[int] = set()

    def value(self, node: yaml.Node, path: Path_) -> Any:
        self.source.lines[path] = node.start_mark.line + 1
        if isinstance(node, yaml.ScalarNode):
            return self.loader.construct_object(node)
        if id(node) in self.open:
            raise yaml.composer.ComposerError(
                None, None, "an alias stands inside its own anchor", node.start_mark
            )
        if node.tag not in _COLLECTIONS:
            message = f"the tag {node.tag} is not allowed in a config"
            raise yaml.constructor.ConstructorError(None, None, message, node.start_mark)
        self.open.add(id(node))
        try:
            if isinstance(node, yaml.SequenceNode):
                return [self.value(child, (*path, index)) for index, child in enumerate(node.value)]
            return self.mapping(node, path)
        finally:
            self.open.discard(id(node))

    def mapping(self, node: yaml.Node, path: Path_) -> dict[str, Any]:
        assert isinstance(node, yaml.MappingNode)
        own = [pair for pair in node.value if pair[0].tag != "tag:yaml.org,2002:merge"]
        written: dict[str, int] = {}
        for key_node, _ in own:
            line = key_node.start_mark.line + 1
            key = self._key(key_node)
            if key in written:
                first = f"first in line {written[key]}"
                self.source.report(f"{key} is written a second time ({first}); keep one of the two.", line)
            written.setdefault(key, line)
        self.loader.flatten_mapping(node)  # resolves `<<`
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = self._key(key_node)
            child = (*path, key)
            values[key] = self.value(value_node, child)
            # The line of the key, not of the value: a list begins one line below its key.
            self.source.lines[child] = key_node.start_mark.line + 1
        return values

    def _key(self, node: yaml.Node) -> str:
        if not isinstance(node, yaml.ScalarNode):
            raise yaml.constructor.ConstructorError(None, None, "a key has to be one word", node.start_mark)
        return str(node.value)
