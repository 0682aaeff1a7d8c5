"""The proof of a merge: its logits beside those of base and adapter as training had them, on a few texts.

The two are loaded one after the other by ways that share nothing with the merge: transformers loads the merged
folder; the base gets its adapter as separate matrices. What is left between them is rounding. It is said beside what
the adapter itself moves the logits by, since that is what rounding must not swallow.
"""

from __future__ import annotations

import gc
import itertools
import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from luthier.config import Config
from luthier.data.examples import Example
from luthier.data.formats import examples_of
from luthier.data.preferences import LeftOut
from luthier.data.readers import open_rows
from luthier.data.render import Renderer
from luthier.errors import LuthierError
from luthier.export.job import unquantized
from luthier.models import adapter_files, quantize
from luthier.models.device import choose_device, choose_dtype
from luthier.models.load import load_model
from luthier.models.lora import adapters, adapters_off
from luthier.models.memory import free_memory
from luthier.models.storage import restore_buffers, widen

log = logging.getLogger("luthier")

TEXTS = (
    "The quick brown fox jumps over the lazy dog, and then it sits down to rest.",
    "### Instruction:\nName three primary colours.\n\n### Response:\nRed, yellow and blue.",
    "def add(a, b):\n    return a + b\n\nprint(add(2, 3))",
    "What is the capital of France? The capital of France is Paris.",
)
ROWS, LONGEST = 4, 256  # sample rows, and tokens of each

# Each merged weight is off by at most half a unit in the last place (a quarter, in the mean), and these errors add up
# over the layers like a random walk: 8 units hold for a thousand. fp32's sums are in another order, hence the floor.
_UNITS, _FLOOR = 8, 1e-4
# Rounding that takes this much of the adapter's effect is worth a warning.
_WORTH_SAYING = 0.25


@dataclass(frozen=True)
class Proof:
    """Attributes:
    largest: largest difference of a logit. relative: root mean square of the differences over that of the logits
        (around their mean). allowed: most that rounding explains. effect: what the adapter changes, measured
        like `relative`; None where that is unknown. tokens: how many were compared. text: what they were.
    """

    largest: float
    relative: float
    allowed: float
    effect: float | None
    tokens: int
    text: str

    @property
    def holds(self) -> bool:
        return self.relative <= self.allowed

    def __str__(self) -> str:
        effect = "" if self.effect is None else f"; the adapter itself changes them by {self.effect:.1e}"
        return (
            f"largest difference of a logit from base + adapter: {self.largest:.1e} on {self.tokens:,} tokens of "
            f"{self.text} ({self.relative:.1e} of the logits' spread{effect})"
        )

    def warning(self) -> str:
        """Empty unless rounding takes a good part of what the adapter does."""
        if self.effect is None or self.relative <= _WORTH_SAYING * self.effect or self.relative < _FLOOR:
            return ""
        return (
            f"rounding takes {min(1.0, self.relative / max(self.effect, 1e-30)):.0%} of what the adapter changes: "
            "merge with --dtype float32, or keep the adapter"
        )


def precision_for_check(config: Config, parameters: int) -> torch.dtype | None:
    """fp32 if the whole model fits in it, else what the device computes in; None if it does not fit in that."""
    device = choose_device(config.model.device_map)
    free = free_memory(device)
    dtypes = (torch.float32, choose_dtype(config, device))
    return next((dtype for dtype in dtypes if 1.1 * parameters * dtype.itemsize < free), None)


def prove(
    config: Config,
    adapter: Path,
    merged: Path,
    dtype: torch.dtype,
    compute: torch.dtype,
    *,
    rounded_from: torch.dtype | None = None,
    exact: bool = True,
    samples: Config | None = None,
    rows: int | None = None,
) -> Proof:
    """Compare a merged folder with base and adapter.

    Args:
        config: how the base is loaded. adapter: folder of the adapter.
        dtype: of the merged weights. compute: of the comparison.
        rounded_from: what the base was in when training quantised it; None if it did not.
        exact: the checkpoint's numbers are the same in that format.
        samples: the config of the run whose rows are to be compared; None takes fixed texts.
        rows: tokens to compare, where the merged model has further ones that begin at random.
    """
    device = choose_device(config.model.device_map)
    tokenizer = _tokenizer(merged, config)
    ids, text = _sample(tokenizer, samples)
    settings = adapter_files.adapter_settings(adapter)
    model = load_model(config, tokenizer, device, rounded_from or compute)
    if rounded_from not in (None, compute):
        restore_buffers(model, compute)
        widen(model, compute)
    adapter_files.load_adapter(model, adapter, settings)
    quantize.take_over(model)
    expected = _logits(model.eval(), ids, device, rows)
    plain = None
    if adapters(model) and not settings.lora_modules_to_save:
        with adapters_off(model):
            plain = _logits(model, ids, device, rows)
    del model
    gc.collect()
    there = unquantized(config).replace("the merged model", base_model=str(merged), revision=None)
    model = load_model(there, tokenizer, device, compute)
    found = _logits(model.eval(), ids, device, rows)
    del model
    gc.collect()
    spread = _rms([x - x.mean(-1, keepdim=True) for x in expected])
    formats = {dtype, compute} if exact or rounded_from is None else {dtype, compute, rounded_from}
    eps = max(torch.finfo(one).eps for one in formats)
    return Proof(
        largest=max(float((x - y).abs().max()) for x, y in zip(expected, found, strict=True)),
        relative=_distance(expected, found) / spread,
        allowed=max(_UNITS * eps, _FLOOR),
        effect=None if plain is None else _distance(expected, plain) / spread,
        tokens=sum(map(len, ids)),
        text=text,
    )


def _tokenizer(merged: Path, config: Config) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(merged, trust_remote_code=config.model.trust_remote_code)
    except Exception as error:  # tokenizers raises bare Exception for a broken file
        raise LuthierError(f"{merged}: its tokenizer cannot be loaded: {error}") from error


def _sample(tokenizer: PreTrainedTokenizerBase, config: Config | None) -> tuple[list[list[int]], str]:
    """Token ids of a few texts, and what they are."""
    # A model that no run has made brings the config that it was loaded by, which has no rows.
    if config is not None and config.data.datasets[0].path != "none":
        entry = config.data.datasets[0]
        try:
            examples: list[Example] = []
            for _, row in itertools.islice(open_rows(entry), ROWS):
                with suppress(LeftOut):
                    examples += examples_of(row, entry, config.data.train_on_inputs, config.preference.rl)
            rendered = Renderer(tokenizer, config).render(examples, entry)
            # Of a pair the first answer with its prompt: the second stands behind it in the same list.
            ends = [min(LONGEST, *one.lengths[:1]) if one.lengths else LONGEST for one in rendered]
            ids = [one.input_ids[:end] for one, end in zip(rendered, ends, strict=True) if len(one.input_ids) > 1]
            if ids:
                return ids, f"{len(ids)} rows of {entry.path}"
        except LuthierError as error:
            log.info("the run's rows cannot be read (%s): fixed texts are compared", error)
    return [tokenizer(text)["input_ids"] for text in TEXTS], f"{len(TEXTS)} fixed texts"


@torch.no_grad()
def _logits(
    model: PreTrainedModel, ids: Sequence[Sequence[int]], device: torch.device, rows: int | None
) -> list[torch.Tensor]:
    return [
        model(input_ids=torch.tensor([one], device=device), use_cache=False).logits[0, :, :rows].float().cpu()
        for one in ids
    ]


def _distance(ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor]) -> float:
    return _rms([x - y for x, y in zip(ours, theirs, strict=True)])


def _rms(parts: Sequence[torch.Tensor]) -> float:
    return float(torch.cat([part.flatten() for part in parts]).pow(2).mean().sqrt())
