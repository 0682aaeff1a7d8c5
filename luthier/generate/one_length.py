"""Prompts of one length at a time, with the model's own cache: for models that take no flat passes.

A recurrent state has read its padding whatever a mask says later, and rotary angles that depend on the length of a text
would change with its neighbours; so prompts of one length go together and nothing is padded. transformers' own cache
is used, whatever the family keeps in it.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from luthier.generate.continuous import Speakers, choose, whose
from luthier.generate.rows import Row

LEAVE_AT = 0.75  # ended rows are dropped when this share or less still runs: each drop copies the cache
# Names under which a model gives and takes its cache; the first is that of nearly all.
CACHE_NAMES = ("past_key_values", "cache_params", "state")


class OneLength:
    """The loop that batches by length; a row that comes later waits for the batch to end.

    Attributes:
        max_cached_tokens: prompt and new tokens of a batch; a single row may have more.
    """

    def __init__(
        self, model: Any, *, max_cached_tokens: int, max_rows: int = 256, speakers: Speakers | None = None
    ) -> None:
        self.model, self.speakers = model, speakers
        self.device = model.get_input_embeddings().weight.device
        self.max_cached_tokens, self.max_rows = max_cached_tokens, max_rows
        self.waiting: list[Row] = []
        takes = inspect.signature(model.forward).parameters
        self._keep_last = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}
        # Where longrope changes all its angles at once, what is cached has the old ones.
        self._switch: int | None = None
        if "longrope" in rope_kinds(model.config):
            self._switch = getattr(model.config.get_text_config(), "original_max_position_embeddings", None)
        self._batch: Iterator[list[Row]] = iter(())

    def submit(self, rows: Iterable[Row]) -> None:
        self.waiting.extend(rows)

    def cancel(self, row: Row) -> None:
        """Take a row back that is not done; a running one leaves with its batch's next token."""
        if row in self.waiting:
            self.waiting.remove(row)
        row.limit = len(row.token_ids)

    def clear(self) -> None:
        self.waiting.clear()
        self._batch = iter(())

    def step(self) -> list[Row]:
        while True:
            if (rows := next(self._batch, None)) is not None:
                return rows
            if not self.waiting:
                return []
            self._batch = self._run(self._next_batch())

    def _next_batch(self) -> list[Row]:
        length = len(self.waiting[0].prompt_ids)
        batch: list[Row] = []
        for row in [row for row in self.waiting if len(row.prompt_ids) == length][: self.max_rows]:
            longest = length + max(row.limit, *(other.limit for other in batch), 0)
            if batch and (len(batch) + 1) * longest > self.max_cached_tokens:
                break
            batch.append(row)
        chosen = set(batch)
        self.waiting = [row for row in self.waiting if row not in chosen]
        return batch

    def _run(self, rows: list[Row]) -> Iterator[list[Row]]:
        """The rows that have got a token, pass by pass."""
        ids = torch.tensor([row.prompt_ids for row in rows], device=self.device)
        inputs: dict[str, Any] = {"input_ids": ids, **self._keep_last}
        while True:
            new = [inputs["input_ids"].shape[1]] * len(rows)
            # Around no `yield`: whoever reads keeps its own setting.
            with torch.no_grad(), whose(self.speakers, rows, new):
                output = self.model(use_cache=True, **inputs)
                # Rows that are done go on until enough are; nobody hears of them.
                running = [place for place, row in enumerate(rows) if not row.done]
                chosen = [rows[place] for place in running]
                choose(chosen, output.logits[:, -1].to(self.device)[running])
            yield chosen
            running = [place for place, row in enumerate(rows) if not row.done]
            if not running:
                return
            if rows[running[0]].length - 1 == self._switch:
                rows = [rows[place] for place in running]
                ids = torch.tensor([row.ids for row in rows], device=self.device)
                inputs = {"input_ids": ids, **self._keep_last}
                continue
            cache_name, cache = next((name, output[name]) for name in CACHE_NAMES if name in output)
            if len(running) <= LEAVE_AT * len(rows) and hasattr(cache, "reorder_cache"):
                cache.reorder_cache(torch.tensor(running, device=self.device))
                rows = [rows[place] for place in running]
            inputs = {"input_ids": torch.tensor([[row.last_id] for row in rows], device=self.device), cache_name: cache}


def rope_kinds(config: Any) -> set[str]:
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
