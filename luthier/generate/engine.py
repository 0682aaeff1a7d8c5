"""Generation over any number of prompts: many at once, or one as a stream.

`generate.continuous` does the work for models that take flat passes, after it has been tried on the very model against
its own forward; `generate.one_length` for the others. transformers' logits processors choose the tokens. Under greedy
decoding every prompt gets the ids that `model.generate` gives it alone.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch

from luthier.errors import DataError
from luthier.generate.continuous import Continuous, Loop, Speakers
from luthier.generate.one_length import OneLength
from luthier.generate.rows import Completion, Row
from luthier.generate.sampling import DEFAULT_NEW_TOKENS, Chooser, Sampling, row_streams
from luthier.generate.text import StopStrings, TextStream
from luthier.models import attention
from luthier.models.isolation import own_logits, prove, same_vectors
from luthier.models.kinds import one_of_each_layer
from luthier.models.load import rows_of_embeddings

log = logging.getLogger("luthier")

MAX_CACHED_TOKENS = 16384  # over all texts at once: 2 GiB of keys and values for an 8B Llama in bf16

__all__ = ["MAX_CACHED_TOKENS", "Completion", "Engine", "TextDeltas", "default_terminators"]


class TextDeltas(Iterator[str]):
    """An answer as it comes; once it is exhausted, `completion` holds the whole of it."""

    def __init__(self, pieces: Callable[[TextDeltas], Iterator[str]]) -> None:
        self.completion: Completion | None = None
        self._pieces = pieces(self)

    def __next__(self) -> str:
        return next(self._pieces)

    def close(self) -> None:
        """Ends generation early; the model is as it was before."""
        self._pieces.close()  # type: ignore[attr-defined]


class Engine:
    """Generates with one model. It may be in training: mode and cache setting are put back after every call.

    `terminators`: ids that end a text; None takes those of the model's GenerationConfig.
    `default_new_tokens`: longest answer where neither a call nor the model's GenerationConfig says.
    `max_cached_tokens`: prompt and new tokens of all texts at once; a single text may exceed it.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        terminators: Sequence[int] | None = None,
        default_new_tokens: int = DEFAULT_NEW_TOKENS,
        max_cached_tokens: int = MAX_CACHED_TOKENS,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.terminators = frozenset(default_terminators(model) if terminators is None else terminators)
        self.default_new_tokens = default_new_tokens
        self.max_cached_tokens = max_cached_tokens
        self.window: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling | None = None,
        on_done: Callable[[int, Completion], None] | None = None,
    ) -> list[Completion]:
        """Completions in the order of the prompts. `on_done(index, completion)` is called as each one ends.

        DataError: a prompt is empty, or leaves no room in the model's context window.
        """
        rows = self.rows(prompts, sampling or Sampling())
        completions: dict[int, Completion] = {}
        for row in self._answered(rows):
            completions[row.index] = completion = row.completion(self.tokenizer)
            if on_done is not None:
                on_done(row.index, completion)
        return [completions[index] for index in range(len(rows))]

    def stream(self, prompt_ids: Sequence[int], sampling: Sampling | None = None) -> TextDeltas:
        """One answer in pieces that never split a character; joined they are its completion's text."""
        rows = self.rows([prompt_ids], sampling or Sampling(), follow=True)

        def pieces(deltas: TextDeltas) -> Iterator[str]:
            for row in self._run(rows):
                if row.done:
                    deltas.completion = row.completion(self.tokenizer)
                if row.piece:
                    yield row.piece

        return TextDeltas(pieces)

    def next_logps(
        self,
        prompts: Sequence[Sequence[int]],
        candidates: Sequence[Sequence[int]],
        on_done: Callable[[int, list[float]], None],
    ) -> None:
        """Log-probs of some ids as the very next token.

        `candidates`: the ids that are asked for, per prompt. `on_done(index, logps)` is called for each prompt, in
        nats over the whole vocabulary. DataError as in `generate`.
        """
        rows = self.rows(prompts, Sampling(max_new_tokens=1, do_sample=False))
        for row in rows:
            row.scores_of = candidates[row.index]
        for row in self._answered(rows):
            on_done(row.index, row.logps)

    def loop(self, speakers: Speakers | None = None) -> Loop:
        """Where rows are submitted and run step by step; see `continuous.Loop`. `speakers`: of a model that several
        adapters share, whose names the rows have as their `adapter`."""
        kind = OneLength if why_not_continuous(self.model) else Continuous
        return kind(self.model, max_cached_tokens=self.max_cached_tokens, speakers=speakers)

    def rows(self, prompts: Sequence[Sequence[int]], sampling: Sampling, follow: bool = False) -> list[Row]:
        """Prompts as a loop takes them. `follow`: each has its text piece by piece.

        DataError: as in `generate`.
        """
        settings = sampling.resolve(self.model, self.default_new_tokens)
        device = self.model.get_input_embeddings().weight.device
        shared: Chooser | None = None
        rows = []
        for index, (prompt, draws) in enumerate(zip(prompts, row_streams(sampling.seed, prompts), strict=True)):
            if (reason := self.why_not(prompt)) is not None:
                which = f"prompt {index + 1} of {len(prompts)}" if len(prompts) > 1 else "the prompt"
                raise DataError(f"{which} {reason}")
            room = settings.max_new_tokens
            if self.window is not None:
                room = min(room, self.window - len(prompt))
            chooser = shared or Chooser(self.model, settings, sorted(self.terminators), len(prompt), device)
            shared = None if chooser.reads_history else chooser
            row = Row(index, [int(token) for token in prompt], room, chooser, draws, self.terminators)
            row.watch = StopStrings(sampling.stop)
            if follow or sampling.stop:
                row.text = TextStream(self.tokenizer, row.prompt_ids)
            rows.append(row)
        return rows

    def described(self, sampling: Sampling) -> dict[str, Any]:
        """The values as they will be used, for a table; greedy is temperature 0 and top_p 1."""
        resolved = sampling.resolve(self.model, self.default_new_tokens)
        greedy = not resolved.do_sample
        return {
            "max_new_tokens": resolved.max_new_tokens,
            "temperature": 0.0 if greedy else resolved.temperature,
            "top_p": 1.0 if greedy else resolved.top_p,
        }

    def why_not(self, prompt_ids: Sequence[int]) -> str | None:
        """Why this prompt cannot be answered; None if it can."""
        if len(prompt_ids) == 0:
            return "is empty: generation needs at least one token to start from"
        if self.window is not None and len(prompt_ids) >= self.window:
            return (
                f"has {len(prompt_ids)} tokens and the model's context window {self.window}: "
                "there is no room for an answer, shorten it"
            )
        return None

    def _answered(self, rows: list[Row]) -> Iterator[Row]:
        """Rows as they end. The longest prompt is first: what is too large for the memory fails at once."""
        return (row for row in self._run(sorted(rows, key=lambda row: -len(row.prompt_ids))) if row.done)

    def _run(self, rows: list[Row]) -> Iterator[Row]:
        """Each row whenever it has got a token."""
        loop = self.loop()
        loop.submit(rows)
        with evaluating(self.model):
            while stepped := loop.step():
                yield from stepped


def default_terminators(model: Any) -> list[int]:
    """End-of-text ids of the model's GenerationConfig; empty where it names none."""
    ids = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if ids is None:
        return []
    return [int(token) for token in ids] if isinstance(ids, (list, tuple)) else [int(ids)]


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """The whole model in eval mode; afterwards every module's own flag, for parts of it may differ."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


# --- may this model write many texts in one flat pass -------------------------------------------------------------

# Model -> its attention, and the answer for that.
_why_not: WeakKeyDictionary[Any, tuple[Any, str]] = WeakKeyDictionary()
_PROMPTS = (9, 14, 5)


def why_not_continuous(model: Any) -> str:
    """Empty if texts of unequal length may share passes on this model, which is tried once; else why not."""
    attends = getattr(model.config, "_attn_implementation", None)
    if model not in _why_not or _why_not[model][0] != attends:
        with evaluating(model):
            _why_not[model] = attends, _try_continuous(model)
        if _why_not[model][1]:
            log.info("prompts of equal length only are answered together: %s", _why_not[model][1])
    return _why_not[model][1]


@torch.no_grad()
def _try_continuous(model: Any) -> str:
    config = model.config.get_text_config()
    chosen = getattr(model.config, "_attn_implementation", None)
    if chosen != attention.NAME:
        return f"attn_implementation {chosen!r} knows whole documents only"
    if "logits_to_keep" not in inspect.signature(model.forward).parameters:
        return f"{type(model).__name__} gives the logits of all tokens or none"
    proof = prove(model, getattr(config, "max_position_embeddings", None) or 4096)
    if not proof.flat:
        return proof.why
    try:
        with one_of_each_layer(model):
            return _compare(model)
    except IndexError:  # a forward that counts its layers by the config
        return _compare(model)
    except (TypeError, ValueError, RuntimeError, NotImplementedError, AttributeError) as error:
        return f"{type(model).__name__} does not take such passes ({' '.join(str(error).split())[:120]})"


def _compare(model: Any) -> str:
    """Two prompts; a token more for each and a third prompt; a token more for all: each against the model's own."""
    embeddings = model.get_input_embeddings().weight
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(rows_of_embeddings(model), (n + 2,), generator=generator).tolist() for n in _PROMPTS]
    loop = Continuous(model, max_cached_tokens=MAX_CACHED_TOKENS)
    loop.slots.resize(3, max(_PROMPTS) + 2)
    a, b, c = _PROMPTS
    found = [
        loop.logits(texts[0][:a] + texts[1][:b], 0, [(0, a), (1, b)]),
        loop.logits([texts[0][a], texts[1][b], *texts[2][: c + 1]], 2, [(2, c + 1)]),
        loop.logits([texts[0][a + 1], texts[1][b + 1], texts[2][c + 1]], 3, []),
    ]
    own = [own_logits(model, torch.tensor(ids, device=embeddings.device)) for ids in texts]
    expected = [
        torch.stack([own[0][a - 1], own[1][b - 1]]),
        torch.stack([own[0][a], own[1][b], own[2][c]]),
        torch.stack([own[0][a + 1], own[1][b + 1], own[2][c + 1]]),
    ]
    if all(same_vectors(one, other, embeddings.dtype) for one, other in zip(found, expected, strict=True)):
        return ""
    return f"in {type(model).__name__} texts come out otherwise than alone"
