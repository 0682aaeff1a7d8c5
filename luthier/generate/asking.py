"""In which format a model is asked, and the engine of what a user names.

A tuned model is asked in the format that it was trained in, which its run folder remembers: whoever asks writes an
instruction, or a conversation, and not a template.
"""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from luthier.artifacts.source import local
from luthier.generate.identity import RUN_CONFIG

if TYPE_CHECKING:
    from luthier.config import Config, DatasetEntry
    from luthier.data.examples import Example
    from luthier.generate.engine import Engine
    from luthier.models.assemble import Found

log = logging.getLogger("luthier")

LONGEST = 512  # new tokens where neither the command nor the model says


def asking_format(
    path: str, tokenizer: Any, run: Config | None, *, raw: bool = False
) -> tuple[Config, DatasetEntry]:
    """The config and dataset entry whose format a prompt is put into.

    A run's own, for its checkpoints and its merged model too: that of its first dataset. Without a run: the chat
    template of the tokenizer, and where there is none, or if `raw`, the text as it is.
    """
    from luthier.config import Config

    above = Path(path).expanduser().resolve().parent / RUN_CONFIG
    own_folder = Path(path).name.startswith("checkpoint-") or Path(path).name in ("merged", "merged-4bit")
    if run is None and own_folder and above.is_file():
        run = Config.load(above)
    if run is not None and not raw:
        return run, run.data.datasets[0]
    kind = "chat_template" if tokenizer.chat_template and not raw else "completion"
    if kind == "completion" and not raw:
        log.info("%s has no chat template and no run's config: the prompt is continued as raw text", path)
    config = Config.from_flat({"base_model": path, "datasets": [{"path": path, "type": kind}]})
    return config, config.data.datasets[0]


class Asking:
    """From what somebody writes to the ids that a model goes on from.

    Attributes:
        config, entry: whose format it is. kind: what rows of the entry are. is_chat: conversations are written by a
            chat template; without it every prompt stands for itself.
    """

    def __init__(self, tokenizer: Any, config: Config, entry: DatasetEntry) -> None:
        from luthier.config.preference_types import is_preference
        from luthier.data.examples import ChatExample
        from luthier.data.formats import kind_of_entry, prompt_example
        from luthier.data.preferences import prompt_text
        from luthier.data.render import Renderer

        self.config, self.entry = config, entry
        self._renderer = Renderer(tokenizer, config)
        self._rl = config.preference.rl
        self.is_chat = isinstance(prompt_example(entry, "text", rl=self._rl), ChatExample)
        compared = is_preference(entry)
        self.kind = "preference" if compared else kind_of_entry(entry, self._rl)
        # A preference run's format may be in its data, which is looked at once and not for every prompt.
        if compared and not self.is_chat and prompt_text(entry, "text", None) is None:
            self._form, self._rl = type(entry)(path=entry.path, type="completion"), None
        else:
            self._form = entry

    @classmethod
    def of(cls, path: str, tokenizer: Any, run: Config | None, *, raw: bool = False) -> Asking:
        return cls(tokenizer, *asking_format(path, tokenizer, run, raw=raw))

    def example(self, instruction: str, input: str = "", system: str | None = None) -> Example:
        """DataError: a text is none: bytes of a command line or a pipe that are no UTF-8 arrive as half surrogates."""
        from luthier.data.examples import ChatExample
        from luthier.data.formats import prompt_example
        from luthier.data.values import text_of

        for text, what in ((instruction, "the prompt"), (input, "its input"), (system or "", "the system text")):
            text_of(text, what, Counter())
        if not self.is_chat:
            return prompt_example(self._form, instruction, input, system, self._rl)
        opening = [{"role": "system", "content": system}] if system else []
        text = f"{instruction}\n{input}" if input else instruction
        return ChatExample([*opening, {"role": "user", "content": text}])

    def ids(self, example: Example) -> list[int]:
        """DataError: the template refuses the conversation, or it has no turn before its answer."""
        return self._renderer.prompt_ids(example, self.entry)


def own_defaults(found: Found) -> Any:
    """What stands in for a model where only its own sampling parameters are wanted: it has a `generation_config`."""
    from transformers import GenerationConfig

    try:
        own = GenerationConfig.from_pretrained(local(found.base), revision=found.loading.model.revision or "main")
    except (OSError, ValueError):  # there is none, or loading the model says what is wrong
        own = None
    return SimpleNamespace(generation_config=own)


def open_engine(path: str, *, raw: bool = False) -> tuple[Engine, Asking]:
    """The engine of a run, an adapter or a model, and how it is asked.

    Raises:
        ModelError: nothing loadable there.
    """
    from luthier.data.hub import notice_missing_network
    from luthier.data.tokenizer import terminator_ids
    from luthier.generate.batches import cached_tokens
    from luthier.generate.engine import Engine, default_terminators
    from luthier.models.assemble import open_for_inference

    if not Path(path).expanduser().exists():
        notice_missing_network()
    model, tokenizer, run = open_for_inference(path)
    asking = Asking.of(path, tokenizer, run, raw=raw)
    terminators = {*terminator_ids(tokenizer, asking.config), *default_terminators(model)}
    engine = Engine(
        model, tokenizer, sorted(terminators), default_new_tokens=LONGEST, max_cached_tokens=cached_tokens(model)
    )
    return engine, asking
