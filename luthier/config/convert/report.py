"""What became of each key of another tool's config, as lists for a person to read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from luthier.config.emit import scalar
from luthier.config.load import raise_problems
from luthier.config.yaml_source import Problem

_NOTHING_ASKED = "null or off, as it is here without it"


@dataclass(frozen=True, slots=True)
class Item:
    """One key of theirs: its dotted name, what there is to say of it, and where it stands."""

    key: str
    text: str = ""
    where: str = ""


@dataclass(slots=True)
class Report:
    """The four lists, the defaults that had to be written, and what a person should look at."""

    tool: str
    """The tool with its version, as `Axolotl 0.19`."""
    name: str
    """The file."""
    carried: list[Item] = field(default_factory=list)
    no_effect: list[Item] = field(default_factory=list)
    unsupported: list[Item] = field(default_factory=list)
    unknown: list[Item] = field(default_factory=list)
    defaults: list[Item] = field(default_factory=list)
    to_check: list[Item] = field(default_factory=list)
    essential: set[str] = field(default_factory=set)
    """Keys that are not supported and cannot be left out, since the run would be of another kind."""

    def text(self) -> str:
        """All of it, a heading for each list that is not empty."""
        return "\n".join(self._lines())

    def raise_for(self, allow_unsupported: bool) -> None:
        """Raise one ConfigError for what stands in the way of a config; nothing if there is none."""
        problems = [Problem(item.where, item.text) for item in self.unknown]
        for item in self.unsupported:
            if item.key in self.essential:
                problems.append(Problem(item.where, f"{item.key}: not supported: {item.text}"))
            elif not allow_unsupported:
                advice = "Change it, or leave it out by `luthier convert FILE --allow-unsupported`."
                problems.append(Problem(item.where, f"{item.key}: not supported: {item.text} {advice}"))
        raise_problems(self.name, problems)

    def _lines(self) -> Iterator[str]:
        yield f"{self.name}: read as {self.tool}"
        quiet = [item for item in self.carried if not item.text]
        if self.carried:
            yield f"  carried over ({len(self.carried)})"
            if quiet:
                yield f"    as they are: {', '.join(item.key for item in quiet)}"
            yield from (f"    {item.key} -> {item.text}" for item in self.carried if item.text)
        if self.no_effect:
            unset = [item.key for item in self.no_effect if not item.text]
            yield f"  without effect here ({len(self.no_effect)})"
            yield from (f"    {item.key}: {item.text}" for item in self.no_effect if item.text)
            if unset:
                yield f"    {_NOTHING_ASKED}: {', '.join(unset)}"
        for title, items in (("not supported", self.unsupported), ("unknown", self.unknown)):
            if items:
                yield f"  {title} ({len(items)})"
                yield from (f"    {item.where}: {_named(item)}" for item in items)
        if self.defaults:
            yield f"  defaults of {self.tool} that are others here, now written ({len(self.defaults)})"
            yield from (f"    {item.key}: {item.text}" for item in self.defaults)
        if self.to_check:
            yield "  to check"
            yield from (f"    {item.key}: {item.text}" for item in self.to_check)


def _named(item: Item) -> str:
    return item.text if item.text.startswith(item.key) else f"{item.key}: {item.text}"


def shown(value: object) -> str:
    """A value in a report, on one line and not too long."""
    text = scalar(value) if not isinstance(value, dict | list) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
