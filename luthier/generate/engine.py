"""Generation over any number of prompts: one loop for a single text, a batch, and a stream.

The loop keeps transformers' own cache and logits processors and is otherwise as bare as it can be, because on
small models the time between two forward passes counts. Prompts are sorted by length and put together with
others of (nearly) the same length, as many as fit a budget of cached tokens. What all of a batch begin with,
a template or a system prompt, is computed once. A batch of equal lengths has no padding and no mask; unequal
ones are padded before the part that differs, masked, and given their own positions. Rows that have ended
leave once they are enough. Under greedy decoding every row gets the ids that `model.generate` gives it alone.
"""

import inspect
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.cache_utils import DynamicLayer

from luthier.errors import DataError
from luthier.generate.sampling import DEFAULT_NEW_TOKENS, Chooser, Sampling, row_streams
from luthier.generate.text import StopStrings, TextStream, continuation

MAX_CACHED_TOKENS = 16384  # over all rows of a batch: 2 GiB of keys and values for an 8B Llama in bf16
PADDING_SLACK = 32  # prompts of one batch differ by at most this many ids, or by a quarter of the longest
LEAVE_AT = 0.75  # ended rows are dropped when this share or less still runs: each drop copies the cache

SHARED_FROM = 8  # ids of a common beginning that are worth a forward pass of their own

# Names under which a model gives and takes its cache; the first is that of nearly all.
CACHE_NAMES = ("past_key_values", "cache_params", "state")


@dataclass
class Completion:
    """One answer. `token_ids` hold the terminator or stop string that ended it, `text` does not."""

    prompt_ids: list[int]
    token_ids: list[int]
    text: str
    finish_reason: str  # "stop": it ended by itself; "length": max_new_tokens or the context window ended it


@dataclass
class _Row:
    """A prompt on its way through the loop."""

    index: int
    prompt_ids: list[int]
    limit: int  # new tokens that it may get
    draws: random.Random
    token_ids: list[int] = field(default_factory=list)
    ended: bool = False  # by a terminator or a stop string
    text: TextStream | None = None  # followed in the loop for a stream, and for stop strings
    watch: StopStrings = field(default_factory=StopStrings)
    piece: str = ""  # what the last token added to the text

    @property
    def done(self) -> bool:
        return self.ended or len(self.token_ids) >= self.limit

    def take(self, token_id: int, terminators: frozenset[int]) -> None:
        self.token_ids.append(token_id)
        self.ended = token_id in terminators
        if self.text is None:
            return
        self.piece = "" if self.ended else self.watch.push(self.text.push(token_id))
        if self.watch.found:
            self.ended = True
        elif self.done:
            self.piece += self.watch.push(self.text.flush()) + self.watch.flush()


class TextDeltas(Iterator[str]):
    """An answer as it comes; once it is exhausted, `completion` holds the whole of it."""

    def __init__(self, pieces: Callable[["TextDeltas"], Iterator[str]]):
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
    `max_cached_tokens`: prompt and new tokens of a batch, over all its rows; a single row may exceed it.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        terminators: Sequence[int] | None = None,
        default_new_tokens: int = DEFAULT_NEW_TOKENS,
        max_cached_tokens: int = MAX_CACHED_TOKENS,
    ):
        self.model = model
        self.tokenizer = tokenizer
        self.terminators = frozenset(default_terminators(model) if terminators is None else terminators)
        self.default_new_tokens = default_new_tokens
        self.max_cached_tokens = max_cached_tokens
        self.window: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        parameters = inspect.signature(model.forward).parameters
        self._takes_positions = "position_ids" in parameters
        self._keep_last = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}
        # A recurrent state has read its padding, whatever the mask says later; and where rotary angles depend
        # on the length of the text, a long row in the batch would change them for a short one.
        recurrent = bool(getattr(model, "_is_stateful", False))
        kinds = _rope_kinds(model.config)
        self._unlike_apart = recurrent or bool(kinds & {"dynamic", "longrope"})
        # Where longrope changes all its angles at once, what is cached has the old ones.
        self._switch: int | None = None
        if "longrope" in kinds:
            self._switch = getattr(model.config.get_text_config(), "original_max_position_embeddings", None)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling | None = None,
        on_done: Callable[[int, Completion], None] | None = None,
    ) -> list[Completion]:
        """Completions in the order of the prompts. `on_done(index, completion)` is called as each one ends.

        DataError: a prompt is empty, or leaves no room in the model's context window.
        """
        sampling = sampling or Sampling()
        settings = sampling.resolve(self.model, self.default_new_tokens)
        rows = self._rows(prompts, sampling, settings)
        completions: dict[int, Completion] = {}
        with _evaluating(self.model):
            for batch in self._batches(rows, settings):
                for row in self._run(batch, settings):
                    if row.done:
                        completions[row.index] = completion = self._completion(row, sampling.stop)
                        if on_done is not None:
                            on_done(row.index, completion)
        return [completions[index] for index in range(len(rows))]

    def stream(self, prompt_ids: Sequence[int], sampling: Sampling | None = None) -> TextDeltas:
        """One answer in pieces that never split a character; joined they are its completion's text."""
        sampling = sampling or Sampling()
        settings = sampling.resolve(self.model, self.default_new_tokens)
        rows = self._rows([prompt_ids], sampling, settings, follow=True)

        def pieces(deltas: TextDeltas) -> Iterator[str]:
            with _evaluating(self.model):
                for row in self._run(rows, settings):
                    if row.done:
                        deltas.completion = self._completion(row, sampling.stop)
                    if row.piece:
                        yield row.piece

        return TextDeltas(pieces)

    @torch.no_grad()
    def next_logps(
        self,
        prompts: Sequence[Sequence[int]],
        candidates: Sequence[Sequence[int]],
        on_done: Callable[[int, list[float]], None],
    ) -> None:
        """Log-probs of some ids as the very next token: one pass over every prompt, batched as in `generate`.

        `candidates`: the ids that are asked for, per prompt. `on_done(index, logps)` is called for each prompt, in
        nats over the whole vocabulary. DataError as in `generate`.
        """
        sampling = Sampling(max_new_tokens=1, do_sample=False)
        settings = sampling.resolve(self.model)
        with _evaluating(self.model):
            for rows in self._batches(self._rows(prompts, sampling, settings), settings):
                _, _, inputs = self._first_inputs(rows)
                logps_BV = self.model(**inputs).logits[:, -1].float().log_softmax(-1).cpu()
                for row, logps_V in zip(rows, logps_BV, strict=True):
                    on_done(row.index, logps_V[list(candidates[row.index])].tolist())

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

    def _rows(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        settings: GenerationConfig,
        follow: bool = False,
    ) -> list[_Row]:
        rows = []
        for index, (prompt, draws) in enumerate(
            zip(prompts, row_streams(sampling.seed, prompts), strict=True)
        ):
            if (reason := self.why_not(prompt)) is not None:
                which = f"prompt {index + 1} of {len(prompts)}" if len(prompts) > 1 else "the prompt"
                raise DataError(f"{which} {reason}")
            room = settings.max_new_tokens
            if self.window is not None:
                room = min(room, self.window - len(prompt))
            row = _Row(index, [int(token) for token in prompt], room, draws)
            if follow or sampling.stop:
                row.text, row.watch = TextStream(self.tokenizer, row.prompt_ids), StopStrings(sampling.stop)
            rows.append(row)
        return rows

    def _completion(self, row: _Row, stop: Sequence[str]) -> Completion:
        ids = row.token_ids
        spoken = ids[:-1] if ids and ids[-1] in self.terminators else ids
        text = continuation(self.tokenizer, row.prompt_ids, spoken)
        places = [place for place in (text.find(string) for string in stop) if place >= 0]
        if places:
            text = text[: min(places)]
        return Completion(row.prompt_ids, ids, text, "stop" if row.ended else "length")

    def _batches(self, rows: list[_Row], settings: GenerationConfig) -> Iterator[list[_Row]]:
        """Rows of like length, the longest first: what is too large for the memory fails at once."""
        alone = Chooser(self.model, settings, sorted(self.terminators), width=1, device="cpu")
        equal = self._unlike_apart or alone.reads_history or not self._takes_positions
        batch: list[_Row] = []
        for row in sorted(rows, key=lambda row: -len(row.prompt_ids)):
            if batch:
                longest = len(batch[0].prompt_ids)
                slack = 0 if equal else max(PADDING_SLACK, longest // 4)
                cached = (len(batch) + 1) * (longest + settings.max_new_tokens)
                if longest - len(row.prompt_ids) > slack or cached > self.max_cached_tokens:
                    yield batch
                    batch = []
            batch.append(row)
        if batch:
            yield batch

    def _shared_beginning(self, rows: Sequence[_Row], device: Any) -> tuple[int, dict[str, Any]]:
        """How many ids all prompts begin with, and the cache of them for every row; (0, {}): not worth it.

        A row keeps at least one id of its own, whose logits choose its first token.
        """
        prompts = [row.prompt_ids for row in rows]
        first, last = min(prompts), max(prompts)  # as in a dictionary: what these two share, all share
        shortest, longest = min(map(len, prompts)), max(map(len, prompts))
        shared = next((n for n in range(shortest - 1) if first[n] != last[n]), shortest - 1)
        if len(rows) == 1 or shared < SHARED_FROM or self._unlike_apart:
            return 0, {}
        ids = torch.tensor([first[:shared]], device=device)
        cache = self.model(input_ids=ids, use_cache=True, **self._keep_last).get(CACHE_NAMES[0])
        layers = getattr(cache, "layers", [])
        # A sliding window counts places in the cache: padding after the beginning would shorten it.
        if not layers or (shortest < longest and any(type(layer) is not DynamicLayer for layer in layers)):
            return 0, {}
        cache.batch_repeat_interleave(len(rows))
        return shared, {CACHE_NAMES[0]: cache}

    def _first_inputs(self, rows: Sequence[_Row]) -> tuple[Tensor, Tensor | None, dict[str, Any]]:
        """Ids and mask as `_laid_out` gives them, and what the pass over the prompts takes."""
        device = self.model.get_input_embeddings().weight.device
        width = max(len(row.prompt_ids) for row in rows)
        shared, inputs = self._shared_beginning(rows, device)
        ids, mask = _laid_out(rows, shared, width, device)
        inputs |= {"input_ids": ids[:, shared:width], "use_cache": True, **self._keep_last}
        if mask is not None:
            inputs["attention_mask"] = mask[:, :width]
            inputs["position_ids"] = (mask[:, :width].cumsum(-1) - 1).clamp(min=0)[:, shared:]
        return ids, mask, inputs

    @torch.no_grad()
    def _run(self, rows: list[_Row], settings: GenerationConfig) -> Iterator[_Row]:
        """The loop: yields each row whenever it has got a token.

        Not `inference_mode`: a tensor that a module keeps from here (rotary tables, cast adapter weights)
        must serve a backward pass later.
        """
        rows = list(rows)
        device = self.model.get_input_embeddings().weight.device
        width = max(len(row.prompt_ids) for row in rows)
        chooser = Chooser(self.model, settings, sorted(self.terminators), width, device)
        ids, mask, inputs = self._first_inputs(rows)
        end = width
        while True:
            # 1. One forward pass: the prompts at first, then the last token of every row.
            output = self.model(**inputs)
            # 2. The next tokens, and the rows that they end.
            chosen = chooser(ids[:, :end], output.logits[:, -1].to(device), [row.draws for row in rows])
            for row, token_id in zip(rows, chosen.tolist(), strict=True):
                if not row.done:
                    row.take(token_id, self.terminators)
                    yield row
            running = [place for place, row in enumerate(rows) if not row.done]
            if not running:
                return
            ids[:, end] = chosen
            end += 1
            # 3. Ended rows leave, if there are enough of them.
            cache_name, cache = next((name, output[name]) for name in CACHE_NAMES if name in output)
            if len(running) <= LEAVE_AT * len(rows) and hasattr(cache, "reorder_cache"):
                keep = torch.tensor(running, device=device)
                cache.reorder_cache(keep)
                rows, ids = [rows[place] for place in running], ids[keep]
                mask = None if mask is None else mask[keep]
            # 4. What the next pass sees.
            inputs = {"input_ids": ids[:, end - 1 : end], "use_cache": True, cache_name: cache}
            if mask is not None:
                inputs["attention_mask"] = mask[:, :end]
                inputs["position_ids"] = mask[:, :end].sum(-1, keepdim=True) - 1
            if end - 1 == self._switch:
                inputs = {"input_ids": ids[:, :end], "use_cache": True, **self._keep_last}


def default_terminators(model: Any) -> list[int]:
    """End-of-text ids of the model's GenerationConfig; empty where it names none."""
    ids = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if ids is None:
        return []
    return [int(token) for token in ids] if isinstance(ids, (list, tuple)) else [int(ids)]


def _laid_out(rows: Sequence[_Row], shared: int, width: int, device: Any) -> tuple[Tensor, Tensor | None]:
    """Ids (B, width + longest answer) and a mask of the same shape, None where no row needs padding.

    A row is its `shared` first ids, padding, the rest of its prompt up to `width`, then room for the answer.
    """
    total = width + max(row.limit for row in rows)
    ids = torch.zeros(len(rows), total, dtype=torch.long)
    mask = torch.ones(len(rows), total, dtype=torch.long)
    for place, row in enumerate(rows):
        prompt, gap = torch.tensor(row.prompt_ids), width - len(row.prompt_ids)
        ids[place, :shared], ids[place, shared + gap : width] = prompt[:shared], prompt[shared:]
        mask[place, shared : shared + gap] = 0
    padded = any(len(row.prompt_ids) < width for row in rows)
    return ids.to(device), mask.to(device) if padded else None


def _rope_kinds(config: Any) -> set[str]:
    """Names of the kinds of rotary embedding in a config; layers may have several."""
    text_config = config.get_text_config()
    found = [getattr(text_config, name, None) for name in ("rope_parameters", "rope_scaling")]
    kinds: set[str] = set()
    while found:
        value = found.pop()
        if isinstance(value, dict):
            kinds |= {str(value[key]) for key in ("rope_type", "type") if value.get(key)}
            found.extend(inner for inner in value.values() if isinstance(inner, dict))
    return kinds


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """The whole model in eval mode; afterwards every module's own flag, for parts of it may differ."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
