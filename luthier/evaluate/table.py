"""Figures of an evaluation as text for people, in 80 columns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

NAMES = {
    "loss": "loss",
    "perplexity": "perplexity",
    "token_accuracy": "token accuracy",
    "exact_match": "exact match",
    "stopped": "ends by itself",
    "prefers_chosen": "prefers chosen",
    "desirable_logp": "logp, good",
    "undesirable_logp": "logp, bad",
    "desirable_reward": "reward, good",
    "undesirable_reward": "reward, bad",
    "reward_accuracy": "rewards right",
    "reward_margin": "reward margin",
    "kl": "KL",
}
SHARES = ("token_accuracy", "exact_match", "stopped", "prefers_chosen", "reward_accuracy")
# Figures that are shown by group; the others are in the JSON.
BY_GROUP = ("loss", "token_accuracy", "exact_match", "prefers_chosen", "reward_accuracy")
MOST_GROUPS = 40

_WIDTH = 80
_FIRST, _COLUMN, _DIFFERENCE = 14, 21, 24


def lines_of(
    figures: dict[str, Any], target: str, compare: str | None, *, by_group: Sequence[str] = BY_GROUP
) -> Iterator[str]:
    """The whole table.

    Args:
        figures: as `figures.all_figures` gives them. target, compare: what to call the models. by_group: which figures
            are shown by group as well.
    """
    names = [target] if compare is None else [compare, target]
    whole = figures["all"]
    yield _head("", names, compare is not None)
    for name, label in NAMES.items():
        if name in whole["target"]:
            yield _line(label, whole, name)
    for column, groups in figures["by"].items():
        for name in by_group:
            if name in whole["target"]:
                yield ""
                yield from _groups(column, groups, name, names, compare is not None)
    yield ""
    yield "[ ] 95% interval, rows drawn again 1,000 times" + ("; * beyond chance" if compare else "")
    if compare is not None:
        yield ""
        yield from sentences(whole["difference"], compare)


def sentences(difference: dict[str, Any], compare: str) -> Iterator[str]:
    """Each difference to the model `compare` in words."""
    for name, found in difference.items():
        value, low, high = (found[key] for key in ("value", "low", "high"))
        if low is None or high is None:
            continue
        if not found["beyond_chance"]:
            few = low > 0 or high < 0
            what = "too few rows differ to tell it from chance" if few else "no difference beyond chance"
            yield f"{NAMES[name]}: {what} ({_amount(name, value, '+')}, {_span(name, low, high)})."
            continue
        word = "better" if found["better"] else "worse"
        if name == "stopped":
            word = "more often" if value > 0 else "less often"
        ends = sorted((abs(low), abs(high)))
        yield f"{NAMES[name]}: {word} than {_cut(compare, 20)} by {_amount(name, abs(value))} ({_span(name, *ends)})."


def _span(name: str, low: float, high: float) -> str:
    return f"{_number(name, low)} to {_number(name, high)}"


def _amount(name: str, value: float, sign: str = "") -> str:
    return _number(name, value, sign) + (" points" if name in SHARES else "")


def _groups(column: str, groups: dict[str, Any], name: str, names: list[str], paired: bool) -> Iterator[str]:
    yield f"{NAMES[name]}, by {column} (rows)"
    yield _head("", names, paired)
    for value in list(groups)[:MOST_GROUPS]:
        if name in groups[value]["target"]:
            yield _line(f"{value} ({groups[value]['rows']})", groups[value], name)
    if len(groups) > MOST_GROUPS:
        yield f"... and {len(groups) - MOST_GROUPS} more, in the JSON"


def _head(title: str, names: list[str], paired: bool) -> str:
    columns = "".join(f"{_cut(name, _COLUMN - 2):>{_COLUMN}}" for name in names)
    return f"{title:<{_FIRST}}{columns}" + (f"{'difference':>{_DIFFERENCE - 1}}" if paired else "")


def _line(label: str, group: dict[str, Any], name: str) -> str:
    cells = ""
    if "compare" in group:
        cells += f" {_cell(name, group['compare'].get(name)):>{_COLUMN - 1}}"
    cells += f" {_cell(name, group['target'][name]):>{_COLUMN - 1}}"
    if found := group.get("difference", {}).get(name):
        cells += f"{_cell(name, found, '+') + ('*' if found['beyond_chance'] else ' '):>{_DIFFERENCE}}"
    # A long name has a line of its own.
    first = f"{label:<{_FIRST}}" if len(label) <= _FIRST else f"{_cut(label, _WIDTH)}\n{'':<{_FIRST}}"
    return (first + cells).rstrip()


def _cell(name: str, figure: dict[str, Any] | None, sign: str = "") -> str:
    if figure is None or figure["value"] is None:
        return "-"
    value = _number(name, figure["value"], sign)
    if figure["low"] is None or figure["high"] is None:
        return value
    return f"{value} [{_number(name, figure['low'])} {_number(name, figure['high'])}]"


def _number(name: str, value: float, sign: str = "") -> str:
    if name in SHARES:
        return f"{100 * value:{sign}.1f}"
    if name == "perplexity":
        return f"{value:.3g}" if value < 999.5 else f"{value:.1e}".replace("e+0", "e").replace("e+", "e")
    if name.endswith("logp"):  # negative, and of any size: less room for decimals
        return f"{value:{sign}.{2 if abs(value) < 10 else 1 if abs(value) < 100 else 0}f}"
    return f"{value:{sign}.3f}" if abs(value) < 10 else f"{value:{sign}.2f}"


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"
