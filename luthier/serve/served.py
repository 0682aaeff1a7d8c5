"""A model by its name: how a request becomes the rows of a loop, in the format that the model was trained in.

A run that was trained on conversations, or a model with a chat template, is asked with the whole conversation. A run
that was trained on single instructions (Alpaca and its kin) has no place for earlier turns: it takes one message of
the user and a system text. What knows neither can only continue raw text.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any
from weakref import WeakValueDictionary

from luthier.config import Config, DatasetEntry
from luthier.data.examples import ChatExample, Segment, TextExample
from luthier.data.tokenizer import terminator_ids
from luthier.errors import ConfigError, DataError
from luthier.generate.asking import LONGEST, Asking
from luthier.generate.engine import Engine, default_terminators
from luthier.generate.rows import Row
from luthier.generate.sampling import Chooser
from luthier.models.several import Several
from luthier.serve.errors import bad
from luthier.serve.requests import Asked, Message

_RAW = ("completion", "input_output", "tokens")


class Served:
    """Attributes:
    name, adapter: of `Several`. engine: makes rows. kind: how chats are put, "chat", "instruction" or "raw".
    max_tokens: of an answer; None: as far as the model's context goes, which then is known.
    """

    def __init__(self, several: Several, name: str, max_cached_tokens: int, max_tokens: int | None) -> None:
        target = several.targets[name]
        tokenizer = target.tokenizer
        self.name, self.adapter = name, target.adapter
        # A tokenizer cannot be written to by one thread while another reads: prompts are made with one of their own.
        own: Any = copy.deepcopy(tokenizer)
        asking = Asking.of(target.path, own, target.run)
        if asking.kind in _RAW and own.chat_template:  # trained on raw text, with a model's own template still there
            asking = Asking(own, *_in_template(target.path))
        self._asking = asking
        self.kind = "chat" if asking.is_chat else "raw" if asking.kind in _RAW else "instruction"
        ends = {*terminator_ids(own, asking.config), *default_terminators(several.model)}
        self.engine = Engine(
            several.model,
            tokenizer,
            sorted(ends),
            default_new_tokens=LONGEST,
            max_cached_tokens=max_cached_tokens,
        )
        self._choosers: WeakValueDictionary[tuple[Any, ...], Chooser] = WeakValueDictionary()
        # Without a length of its own (a recurrent model) nothing else would end an answer.
        self.max_tokens = max_tokens or (max_cached_tokens if self.engine.window is None else None)
        embeddings: Any = several.model.get_input_embeddings()
        self._vocabulary = int(embeddings.weight.shape[0])

    def rows(self, asked: Asked) -> list[Row]:
        """A row for each answer, those of one prompt together.

        Raises:
            ApiError: the format, the template or the model's context has no place for it.
        """
        try:
            prompts = self._prompts(asked)
            sampling = asked.sampling
            if self.max_tokens is not None:
                wanted = sampling.max_new_tokens or self.engine.described(sampling)["max_new_tokens"]
                sampling = replace(sampling, max_new_tokens=min(wanted, self.max_tokens))
            for ids in prompts:
                if (reason := self.engine.why_not(ids)) is not None:
                    raise bad(f"the prompt {reason}", self._field(asked), "context_length_exceeded" if ids else None)
            every = [ids for ids in prompts for _ in range(asked.n)]
            rows = self.engine.rows(every, sampling, follow=asked.stream)
        except (ConfigError, DataError) as error:
            raise bad(str(error), self._field(asked)) from error
        alike = (sampling.do_sample, sampling.temperature, sampling.top_p, sampling.top_k)
        for row in rows:
            row.adapter = self.adapter
            # Texts with one chooser have their tokens chosen in one call, and the requests of many clients ask alike.
            if not row.chooser.reads_history:
                row.chooser = self._choosers.setdefault(alike, row.chooser)
        return rows

    def check(self, asked: Asked) -> None:
        """What can be said before the prompt is read.

        Raises:
            ApiError: longer answers than this server gives.
        """
        wanted = asked.sampling.max_new_tokens
        if self.max_tokens is not None and wanted is not None and wanted > self.max_tokens:
            raise bad(f"max_tokens: {wanted}; this server gives at most {self.max_tokens}", "max_tokens")

    @staticmethod
    def _field(asked: Asked) -> str:
        return "prompt" if asked.messages is None else "messages"

    def _prompts(self, asked: Asked) -> list[list[int]]:
        if asked.messages is not None:
            return [self._chat(asked.messages)]
        assert asked.prompts is not None
        return [self._text(prompt) for prompt in asked.prompts]

    def _chat(self, messages: list[Message]) -> list[int]:
        if self.kind == "chat":
            return self._asking.ids(ChatExample([dict(message) for message in messages]))
        if self.kind == "raw":
            raise bad(f"{self.name} has no chat template: ask it at /v1/completions", "model")
        system = "\n\n".join(message["content"] for message in messages if message["role"] == "system")
        asks = [message for message in messages if message["role"] != "system"]
        if len(asks) > 1:
            raise bad(
                f"{self.name} was trained on single instructions and knows no earlier turns: send one message of the "
                "user, and a system message if there is one",
                "messages",
            )
        return self._asking.ids(self._asking.example(asks[0]["content"], system=system or None))

    def _text(self, prompt: str | list[int]) -> list[int]:
        if isinstance(prompt, str):
            return self._asking.ids(TextExample((Segment(prompt, False),), add_eos=False))
        wrong = next((one for one in prompt if not 0 <= one < self._vocabulary), None)
        if wrong is not None:
            raise bad(f"prompt: {wrong} is no token of this model, which has {self._vocabulary}", "prompt")
        return prompt


def _in_template(path: str) -> tuple[Config, DatasetEntry]:
    config = Config.from_flat({"base_model": path, "datasets": [{"path": path, "type": "chat_template"}]})
    return config, config.data.datasets[0]
