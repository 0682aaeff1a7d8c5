"""What the config can hold, for editors, for the command line and for the documentation.

All three are made from the types and the texts under the fields, so that none of them can fall behind:
`luthier config-schema` (JSON Schema of the flat YAML), `luthier train --help`, and docs/reference/config.md,
which `python -m luthier.config.reference > docs/reference/config.md` writes and a test compares.
"""

from __future__ import annotations

import json
import shutil
import textwrap
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from luthier.config.base import Section
from luthier.config.datasets import DatasetEntry, UserPreference, UserPrompt
from luthier.config.distributed import FsdpConfig
from luthier.config.emit import scalar
from luthier.config.schema import SECTIONS, LoftQ, LrGroup, Sections, SpecialTokens
from luthier.config.values import expected, help_of, summary

_INNER: tuple[tuple[str, type[Section]], ...] = (
    ("An entry of `datasets` or `test_datasets`", DatasetEntry),
    ("A prompt format of your own, as the `type` of an entry", UserPrompt),
    ("A format of your own for preference runs, as the `type` of an entry", UserPreference),
    ("`special_tokens`", SpecialTokens),
    ("`loftq_config`", LoftQ),
    ("An entry of `lr_groups`", LrGroup),
    ("`fsdp_config`", FsdpConfig),
)


def command() -> None:
    """Print the JSON Schema of the config, for editors that check YAML while it is written."""
    print(json.dumps(json_schema(), indent=2))


def json_schema() -> dict[str, Any]:
    """JSON Schema (2020-12) of a config file: flat keys, nothing beside them, null for what is unset."""
    properties: dict[str, Any] = {}
    required: list[str] = []
    definitions: dict[str, Any] = {}
    for section in SECTIONS.values():
        schema = section.model_json_schema()
        properties |= schema["properties"]
        required += schema.get("required", [])
        definitions |= schema.get("$defs", {})
    for name in definitions:
        needed = definitions[name].get("required", [])
        definitions[name]["properties"] = _with_null(definitions[name]["properties"], needed)
    inside = definitions[FsdpConfig.__name__]["properties"]
    inside |= {f"{FsdpConfig.prefix}{key}": about for key, about in inside.items()}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Luthier config",
        "description": "What `luthier train` does. Unset keys (null or left out) have their default.",
        "type": "object",
        "additionalProperties": False,
        "required": required,
        "properties": _with_null(properties, required),
        "$defs": definitions,
    }


def _with_null(properties: dict[str, Any], required: list[str]) -> dict[str, Any]:
    """The properties with null allowed where a value is not required, help on one line, and no titles, which
    only repeat the names."""
    changed: dict[str, Any] = {}
    for key, schema in properties.items():
        about = {name: schema[name] for name in ("description", "default") if schema.get(name) is not None}
        if "description" in about:
            about["description"] = " ".join(about["description"].split())
        kind = {
            name: value for name, value in schema.items() if name not in ("title", "description", "default")
        }
        options = kind["anyOf"] if set(kind) == {"anyOf"} else [kind]
        if key not in required and {"type": "null"} not in options:
            options = [*options, {"type": "null"}]
        changed[key] = {**about, "anyOf": options}
    return changed


def help_text(width: int | None = None) -> str:
    """All keys by section and then those inside of others, with type, default and the first sentence of
    their help, for a terminal."""
    width = min(width or shutil.get_terminal_size().columns, 110)
    lines: list[str] = []
    headed = [
        (Sections.model_fields[name].description or name, section) for name, section in SECTIONS.items()
    ]
    for heading, section in (*headed, *_INNER):
        lines += ["", heading]
        for key, info in section.model_fields.items():
            first, *more = textwrap.wrap(f"({_kind(info)})", width - len(key) - 4)
            lines += [f"  {key}  {first}", *(" " * 6 + line for line in more)]
            lines += textwrap.wrap(summary(info), width, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines[1:]) + "\n"


def markdown() -> str:
    """The reference page."""
    parts = [_PREFACE]
    for name, section in SECTIONS.items():
        parts.append(_table(Sections.model_fields[name].description or name, section))
    for heading, model in _INNER:
        parts.append(_table(heading, model))
    return "\n".join(parts)


_PREFACE = """\
# Config reference

<!-- Made by `python -m luthier.config.reference > docs/reference/config.md`; a test compares. -->

A config is a YAML file with the keys below. Each can be overridden on the command line, as `key=value` or
`--key value`; `datasets.0.path=data.jsonl` reaches inside. A key that is left out or `null` has its default.
Unknown keys, values of another type and keys that contradict each other are errors, all reported at once with
file and line.

`luthier validate CONFIG` shows every value and where it came from; `luthier config-schema` prints a JSON
Schema for editors.
"""


def _table(heading: str, section: type[BaseModel]) -> str:
    about = " ".join((section.__doc__ or "").split())
    rows = [
        f"| `{key}` | {_cell(_kind(info))} | {_cell(help_of(info))} |"
        for key, info in section.model_fields.items()
    ]
    return "\n".join(
        [f"## {heading}", "", about, "", "| key | value | meaning |", "|---|---|---|", *rows, ""]
    )


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _kind(info: FieldInfo) -> str:
    """Type and default, such as `a whole number = 16`."""
    if info.is_required():
        return f"{expected(info.annotation)}; required"
    default = info.default
    if default is None or default in ([], {}) or isinstance(default, BaseModel):
        return expected(info.annotation)
    return f"{expected(info.annotation)}; default {scalar(default)}"


if __name__ == "__main__":
    print(markdown(), end="")
