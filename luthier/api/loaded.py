"""`luthier.load`: a run, an adapter or a model, ready to be asked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from luthier.api.said import speak
from luthier.config import Config
from luthier.data.examples import ChatExample
from luthier.data.formats import prompt_example
from luthier.data.render import Renderer
from luthier.data.tokenizer import terminator_ids
from luthier.errors import ConfigError, DataError
from luthier.generate.asking import LONGEST, asking_format
from luthier.generate.engine import Engine, default_terminators
from luthier.generate.sampling import Sampling
from luthier.models.assemble import open_for_inference
from luthier.models.device import choose_device

Message = dict[str, Any]
Prompt = str | Sequence[Message]


class Loaded:
    """A model that answers, in the format that it was trained in.

    Attributes:
        model: of transformers, its adapter merged in memory. tokenizer: its own. config: of the run; None for what is
            no run.
    """

    def __init__(
        self, path: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: Config | None
    ) -> None:
        self.path, self.model, self.tokenizer, self.config = path, model, tokenizer, config
        self._engines: dict[bool, tuple[Engine, Renderer, Any, Config]] = {}

    def generate(
        self,
        prompts: Any,
        *,
        system: str | None = None,
        raw: bool = False,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        do_sample: bool | None = None,
        seed: int | None = None,
        stop: Sequence[str] = (),
    ) -> Any:
        """Answers to prompts, all of them computed together.

        Args:
            prompts: a text, a conversation (a list of messages with `role` and `content`), or a list of either. A text
                is put into the run's format, of which `system` is part. raw: it is continued as it is.
            max_new_tokens, ...: None takes the model's own setting. do_sample=False is greedy.

        Returns:
            The answer's text; a list of them, in order, for a list.
        """
        alone = _is_one(prompts)
        engine, ids = self._ids([prompts] if alone else list(prompts), system, raw)
        sampling = _sampling(max_new_tokens, temperature, top_p, top_k, do_sample, seed, stop)
        texts = [completion.text for completion in engine.generate(ids, sampling)]
        return texts[0] if alone else texts

    def stream(
        self,
        prompt: Prompt,
        *,
        system: str | None = None,
        raw: bool = False,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        do_sample: bool | None = None,
        seed: int | None = None,
        stop: Sequence[str] = (),
    ) -> Iterator[str]:
        """One answer in pieces as it comes; arguments as in `generate`."""
        engine, ids = self._ids([prompt], system, raw)
        return engine.stream(ids[0], _sampling(max_new_tokens, temperature, top_p, top_k, do_sample, seed, stop))

    def _ids(self, prompts: Sequence[Prompt], system: str | None, raw: bool) -> tuple[Engine, list[list[int]]]:
        if raw not in self._engines:
            config, entry = asking_format(self.path, self.tokenizer, self.config, raw=raw)
            ends = {*terminator_ids(self.tokenizer, config), *default_terminators(self.model)}
            engine = Engine(self.model, self.tokenizer, sorted(ends), default_new_tokens=LONGEST)
            self._engines[raw] = engine, Renderer(self.tokenizer, config), entry, config
        engine, renderer, entry, config = self._engines[raw]
        found = []
        for prompt in prompts:
            if not isinstance(prompt, str) and not (_is_one(prompt) and isinstance(prompt, list | tuple)):
                raise DataError(f"a prompt is a text, or a list of messages with role and content, not {prompt!r:.80}")
            if isinstance(prompt, str):
                example = prompt_example(entry, prompt, "", system, config.preference.rl)
            elif raw or not self.tokenizer.chat_template:
                why = "raw=True takes a text as it is" if raw else "the tokenizer has no chat template"
                raise ConfigError(f"messages cannot be asked: {why}; give a text")
            else:
                opening = [{"role": "system", "content": system}] if system else []
                example = ChatExample([*opening, *map(dict, prompt)])
            found.append(renderer.prompt_ids(example, entry))
        return engine, found

    def __repr__(self) -> str:
        return f"luthier.load({self.path!r}): {type(self.model).__name__}, {self.model.num_parameters():,} parameters"


def load(run_or_model: str, *, device: str | None = None, dtype: torch.dtype | None = None) -> Loaded:
    """Open a run folder, an adapter, a model folder or a name on the hub.

    Args:
        device: such as "cuda"; None takes the run's, or the best there is. dtype: None takes what the run computed in.

    Raises:
        LuthierError: there is nothing that can be loaded.
    """
    speak()
    place = None if device is None else choose_device(device)
    path = str(run_or_model)
    model, tokenizer, config = open_for_inference(path, device=place, dtype=dtype)
    return Loaded(path, model, tokenizer, config)


def _is_one(prompts: Any) -> bool:
    if isinstance(prompts, str | dict) or not hasattr(prompts, "__getitem__"):
        return True
    return len(prompts) > 0 and isinstance(prompts[0], dict)


def _sampling(
    max_new_tokens: int | None,
    temperature: float | None,
    top_p: float | None,
    top_k: int | None,
    do_sample: bool | None,
    seed: int | None,
    stop: Sequence[str],
) -> Sampling:
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    return Sampling(
        max_new_tokens=max_new_tokens,
        do_sample=do_sample,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        stop=stops,
    )
