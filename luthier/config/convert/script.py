"""A notebook or script for Unsloth, TRL or PEFT as a config of ours.

Of the calls that `syntax` finds, those that load a model, put an adapter on it, say how it is trained and load data are
read. What a program does with its rows cannot be read, so the result says which type of rows it takes them for.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from luthier.config.convert import arguments
from luthier.config.convert import script_keys as keys
from luthier.config.convert.conversion import Conversion
from luthier.config.convert.script_rows import datasets
from luthier.config.convert.syntax import Call, Unread, calls, read
from luthier.config.yaml_source import Source
from luthier.errors import ConfigError

SUFFIXES = (".py", ".ipynb")


def convert(path: Path) -> Conversion:
    """The arguments of a script, each in its list, and the libraries' defaults where ours are others."""
    tree, places = read(path)
    into = Conversion(Source(str(path)), keys.TOOL)
    found = list(calls(tree))
    reader = _Script(into, places)
    for call in found:
        reader.call(call)
    if not reader.seen & {*keys.LOADERS, *arguments.CLASSES, *keys.TRAINERS}:
        known = ", ".join((*keys.LOADERS, *keys.TRAINERS))
        raise ConfigError(f"{path}: there is no call of {known}, or of a class of their arguments.")
    reader.method()
    reader.training()
    datasets(into, tree, found, reader.at)
    reader.defaults()
    into.drop_idle()
    return into


class _Script:
    def __init__(self, into: Conversion, places: list[str]) -> None:
        self.into = into
        self.places = places
        self.seen: set[str] = set()
        self.settings: dict[str, Any] = {}
        self.names: dict[str, str] = {}
        self.of_unsloth = False

    def at(self, line: int) -> str:
        """Where a line of the joined text is."""
        return self.places[line - 1] if 0 < line <= len(self.places) else self.into.source.name

    def call(self, call: Call) -> None:
        """One call, if it is one that says something."""
        owner, _, last = call.name.rpartition(".")
        short = f"{owner.rpartition('.')[2]}.{last}" if last in ("from_pretrained", "get_peft_model") else last
        table = keys.CALLS.get(short)
        if table is None:
            return
        if short in self.seen and short in (*keys.LOADERS, *keys.ADAPTERS, *arguments.CLASSES, *keys.TRAINERS):
            self.into.check(short, f"{self.at(call.line)}: a second call is not read")
            return
        self.seen.add(short)
        self.of_unsloth = self.of_unsloth or short.startswith("Fast")
        for name, value in zip(table.positional, call.positional, strict=False):
            call.given.setdefault(name, value)
            call.places.setdefault(name, call.line)
        for text in call.unpacked:
            where = f"{short}(**{text})"
            self._unread(where, f"**{text}", call.line)
        for name, value in call.given.items():
            self._argument(short, table, name, value, call.places.get(name, call.line))

    def _argument(self, short: str, table: keys.Table, name: str, value: Any, line: int) -> None:
        theirs = f"{short}({name})"
        self._mark(theirs, line)
        if name == "model" and short in keys.TRAINERS and not isinstance(value, Unread):
            self.into.carry(theirs, "base_model", value)  # a name instead of a loaded model
            return
        if name in table.passed_on and not (name == "model" and not self.seen & {*keys.LOADERS}):
            return
        if isinstance(value, Unread) and name in ("bf16", "fp16") and keys.ASKS_FOR_BF16.search(value.text):
            value = "auto"
        if isinstance(value, Unread):
            if name in table.no_effect:
                self.into.no_effect(theirs, table.no_effect[name])
            else:
                self._unread(theirs, value.text, line)
        elif table.arguments and (name in arguments.KNOWN):
            if short in keys.TRAINERS and name in self.settings:
                return
            self.settings[name] = value
            self.names[name] = theirs
        elif name in table.special:
            table.special[name](self.into, theirs, value)
        elif value is None:
            self.into.no_effect(theirs)
        elif name in table.carried:
            self.into.carry(theirs, table.carried[name], value)
        elif name in table.no_effect:
            self.into.no_effect(theirs, table.no_effect[name])
        elif name in table.refused:
            self.into.refuse(theirs, value, table.refused[name])
        else:
            known = {*table.carried, *table.special, *table.no_effect, *table.refused, *table.passed_on}
            known |= arguments.KNOWN if table.arguments else set()
            self.into.unknown(theirs, known, f"{short}'s")

    def _mark(self, theirs: str, line: int) -> None:
        self.into.places[theirs] = self.at(line)

    def _unread(self, theirs: str, text: str, line: int) -> None:
        self._mark(theirs, line)
        self.into.unsupported(theirs, f"not read: {text} is no literal: write its value into the result.")

    def method(self) -> None:
        """Which method the trainer's name says."""
        for name, rl in keys.TRAINERS.items():
            if name not in self.seen or rl is None:
                continue
            if rl == "":
                self.into.unsupported(name, "what this trainer does is not built here.", essential=True)
            elif name == "CPOTrainer" and self.settings.get("loss_type") != "simpo":
                self.into.unsupported(name, 'of its losses "simpo" is built here.', essential=True)
            else:
                self.into.carry(name, "rl", rl)

    def training(self) -> None:
        """The arguments of TrainingArguments and its kin, when the method is known."""
        arguments.convert(self.into, self.settings, self.names)
        if self.into.values.get("tokenizer_config") == self.into.values.get("base_model"):
            self.into.values.pop("tokenizer_config", None)

    def defaults(self) -> None:
        """What the libraries do where a script says nothing."""
        into = self.into
        adapted = any(name in self.seen for name in keys.ADAPTERS)
        if "BitsAndBytesConfig" in self.seen:
            self._write(keys.OF_BITSANDBYTES, "BitsAndBytesConfig")
        if self.of_unsloth:
            quantised = into.has("load_in_8bit", "load_in_fp8") or not adapted
            self._write(keys.OF_UNSLOTH, "Unsloth", but={"load_in_4bit"} if quantised else set())
        if adapted:
            into.values["adapter"] = "lora"
            of_peft = "LoraConfig" in self.seen
            named = into.has("lora_target_modules", "lora_target_linear", "lora_target_parameters")
            theirs = keys.ADAPTER_OF_PEFT if of_peft else keys.ADAPTER_OF_UNSLOTH
            self._write(theirs, "PEFT" if of_peft else "Unsloth", but={"lora_target_modules"} if named else set())
        called = next((name for name in arguments.CLASSES if name in self.seen), None)
        defaults = arguments.CLASSES.get(called or "", arguments.TRL)
        self._write(defaults, called or "TRL")
        if "Trainer" not in self.seen:  # TRL's trainers bound rows whatever class their arguments have
            self._write({key: arguments.TRL[key] for key in ("sequence_len", "excess_length_strategy")}, "TRL")
        if into.values.get("rl") == "simpo":
            self._write(keys.OF_SIMPO, "TRL")

    def _write(self, defaults: Mapping[str, Any], whose: str, but: Collection[str] = ()) -> None:
        for key, value in defaults.items():
            if key not in but:
                self.into.default(key, value, whose=whose)
