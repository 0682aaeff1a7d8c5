"""The datasets of an Axolotl config: entries whose keys and types are mostly ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from luthier.config import entries
from luthier.config.convert import axolotl_keys as keys
from luthier.config.convert.conversion import READERS, Conversion, inner, split_and_count
from luthier.config.datasets import DatasetEntry
from luthier.config.schema import FIELDS
from luthier.config.values import INVALID, check_value

ENTRY_KEYS = {*keys.ENTRY_NO_EFFECT, *keys.ENTRY_REFUSED, *keys.ENTRY_HANDLED}


def carry(into: Conversion, key: str, value: Any, given: Mapping[str, Any]) -> None:
    """`datasets`, `test_datasets` or `pretraining_dataset`; an entry that cannot be had is not supported."""
    target = "datasets" if key == "pretraining_dataset" else key
    listed = value if isinstance(value, list) else [value]
    found = []
    for number, entry in enumerate(listed):
        theirs = inner(key, number)
        entry = {"path": entry} if isinstance(entry, str) else entry
        if not isinstance(entry, dict):
            into.unsupported(theirs, "an entry is a mapping with path and type.")
            continue
        if key == "pretraining_dataset":
            entry = {"type": "pretrain"} | entry
        ours = _entry(into, theirs, entry, preferences="rl" in given)
        if (flaw := flaw_of(ours, target, given)) is not None:
            into.unsupported(theirs, flaw)
        elif ours["path"] in READERS and ours.get("data_files"):
            files = ours.pop("data_files")
            found += [ours | {"path": file} for file in (files if isinstance(files, list) else [files])]
        else:
            found.append(ours)
    if found:
        into.values[target] = [*into.values.get(target, []), *found]
        streamed = "" if given.get("streaming") else ": read whole, not streamed"
        into.carried(key, "" if key == target else f"datasets{streamed}")


def flaw_of(entry: Mapping[str, Any], key: str, given: Mapping[str, Any]) -> str | None:
    """What keeps an entry from being one of ours, or None."""
    problems: list[str] = []
    info = FIELDS[key]
    checked = check_value(
        info.annotation, [dict(entry)], (key,), lambda _, message: problems.append(message), info.metadata
    )
    if checked is INVALID:
        return " ".join(problems)
    [ours] = checked
    assert isinstance(ours, DatasetEntry)
    flaws = entries.flaws(ours, bool(given.get("train_on_inputs")), given.get("rl"))
    return " ".join(message for _, message in flaws) or None


def _entry(into: Conversion, theirs: str, entry: Mapping[str, Any], preferences: bool) -> dict[str, Any]:
    """The keys of one entry that are ours, and a word on all others."""
    ours: dict[str, Any] = {}
    for name, value in entry.items():
        place = inner(theirs, name)
        if value is None:
            continue
        if name == "weight":
            ours[name] = value
            if value != 1:
                into.carried(place, "weight, and each epoch goes on with other rows, where there it has the same ones")
        elif name in DatasetEntry.model_fields and name != "epochs":
            ours[name] = dict(value) if isinstance(value, dict) else value
        elif name == "text_column":
            ours["field"] = value
        elif name == "conversation":
            _conversation(into, place, value, ours)
        elif name == "message_field_training" and value == "train":
            into.no_effect(place, "a message's own `train` is always read")
        elif name == "train_on_eot" and value in (entry.get("train_on_eos"), "turn"):
            into.no_effect(place, "train_on_eos says it for the tokens that end a turn")
        elif name in keys.ENTRY_NO_EFFECT:
            into.no_effect(place, keys.ENTRY_NO_EFFECT[name])
        elif name in keys.ENTRY_REFUSED:
            into.refuse(place, value, keys.ENTRY_REFUSED[name])
        else:
            known = {*DatasetEntry.model_fields, *ENTRY_KEYS} - {"epochs"}
            into.unknown(place, known, "a dataset entry of Axolotl's")
    if isinstance(ours.get("split"), str) and "[" in ours["split"]:
        _part(into, inner(theirs, "split"), ours)
    kind = ours.get("type")
    if isinstance(kind, dict):
        ours["type"] = {name: value for name, value in kind.items() if value not in (None, "")}
    elif kind in keys.TYPES and not preferences:
        for name, value in keys.TYPES[kind].items():
            ours[name] = value if name == "type" else ours.get(name, value)
        into.carried(inner(theirs, "type"), f"type: {ours['type']}")
    return ours


def _part(into: Conversion, place: str, ours: dict[str, Any]) -> None:
    """`train[:100]`: the first rows of a split."""
    part = split_and_count(ours["split"])
    if part is None:
        into.unsupported(place, f"{ours['split']}: only the first rows of a split can be taken ([:1000]).")
        del ours["split"]
        return
    ours["split"], count = part
    ours["path"] = f"{ours.get('path')}#{count}"
    into.carried(place, f"path: {ours['path']}")


def _conversation(into: Conversion, place: str, value: Any, ours: dict[str, Any]) -> None:
    """The template of the old type `sharegpt`."""
    if value in keys.TEMPLATES:
        ours["chat_template"] = value
        into.carried(place, f"chat_template: {value}")
    else:
        into.unsupported(place, f"there is no template {value}: write chat_template.")
