"""How the next token is chosen: the parameters a user may set, and what they mean for one batch.

transformers' `GenerationConfig` is the one source of defaults: a parameter left at None is the model's own,
so a model behaves here as in `model.generate`. The logits processors are transformers' too. Only the draw is
ours: each row has a random stream of its own, seeded by the seed and the row's prompt, and one number of it
picks a token from the cumulated probabilities. So a sampled text depends neither on the other rows of its
batch nor on torch's global generator, which a training run must find again exactly where it left it.
"""

import copy
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import GenerationConfig

from luthier.errors import ConfigError

DEFAULT_NEW_TOKENS = 128
# Beyond these a logit divided by the one or multiplied by the other may overflow, and what is chosen means nothing.
LEAST_TEMPERATURE = 1e-6
PENALTIES = (0.01, 100.0)
# Processors that look at the scores alone. Any other one (repetition penalty, banned words, least new tokens, ...)
# also reads the ids before, and is a row's own.
SCORES_ONLY = frozenset(
    {
        "TemperatureLogitsWarper",
        "TopKLogitsWarper",
        "TopPLogitsWarper",
        "TopHLogitsWarper",
        "MinPLogitsWarper",
        "TypicalLogitsWarper",
        "EpsilonLogitsWarper",
        "EtaLogitsWarper",
        "InfNanRemoveLogitsProcessor",
        "LogitNormalization",
        "SuppressTokensLogitsProcessor",
    }
)


class SupportsGeneration(Protocol):
    """The section of a config that sampling is read from."""

    generation_max_new_tokens: int | None
    generation_temperature: float | None
    generation_top_p: float | None
    generation_top_k: int | None
    generation_do_sample: bool | None


@dataclass(frozen=True)
class Sampling:
    """What a caller asks for. None: the model's own default (its GenerationConfig, then transformers').

    A temperature of 0 is greedy. A temperature, top_p or top_k that is set without `do_sample` asks for
    sampling.
    `stop`: strings at which a text ends; they are not part of it. `seed`: None draws a fresh one.
    """

    max_new_tokens: int | None = None
    do_sample: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None
    stop: tuple[str, ...] = ()
    seed: int | None = None

    def __post_init__(self) -> None:
        problems = []
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            problems.append(f"max_new_tokens must be at least 1, not {self.max_new_tokens}")
        if self.temperature is not None and not (self.temperature == 0 or self.temperature >= LEAST_TEMPERATURE):
            problems.append(
                f"temperature must be 0 (greedy) or at least {LEAST_TEMPERATURE:g}, not {self.temperature:g}"
            )
        if self.top_p is not None and not 0 < self.top_p <= 1:
            problems.append(f"top_p must be above 0 and at most 1, not {self.top_p:g}")
        if self.top_k is not None and self.top_k < 0:
            problems.append(f"top_k must be 0 (off) or more, not {self.top_k}")
        low, high = PENALTIES
        if self.repetition_penalty is not None and not low <= self.repetition_penalty <= high:
            problems.append(f"repetition_penalty must be {low:g} to {high:g}, not {self.repetition_penalty:g}")
        if any(not text for text in self.stop):
            problems.append("a stop string is empty: it would end every text before its first token")
        if problems:
            raise ConfigError("generation cannot start: " + "; ".join(problems))

    @classmethod
    def from_config(cls, section: SupportsGeneration, seed: int | None = None) -> "Sampling":
        """The `generation_*` keys of a config."""
        return cls(
            max_new_tokens=section.generation_max_new_tokens,
            do_sample=section.generation_do_sample,
            temperature=section.generation_temperature,
            top_p=section.generation_top_p,
            top_k=section.generation_top_k,
            seed=seed,
        )

    def resolve(self, model: Any, new_tokens: int = DEFAULT_NEW_TOKENS) -> GenerationConfig:
        """The model's GenerationConfig with these values over it and transformers' defaults under it.

        `max_length` of old checkpoints is not read: it counts the prompt as well, and is the context window
        in many.
        """
        own = getattr(model, "generation_config", None)
        resolved = copy.deepcopy(own) if own is not None else GenerationConfig()
        asked_to_sample = self.do_sample
        if asked_to_sample is None and (self.temperature, self.top_p, self.top_k) != (None, None, None):
            asked_to_sample = True
        if self.temperature == 0:
            asked_to_sample = False
        asked = {
            "max_new_tokens": self.max_new_tokens,
            "do_sample": asked_to_sample,
            "temperature": self.temperature or None,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "repetition_penalty": self.repetition_penalty,
        }
        defaults = {
            "max_new_tokens": new_tokens,
            "do_sample": False,
            "temperature": 1.0,
            "top_p": 1.0,
        }
        defaults["top_k"] = 50  # what `model.generate` falls back to as well
        for name, value in asked.items():
            if value is not None:
                setattr(resolved, name, value)
            elif getattr(resolved, name, None) is None and name in defaults:
                setattr(resolved, name, defaults[name])
        # JSON and people write 2 for 2.0, which transformers' processors refuse.
        for name in ("temperature", "top_p", "repetition_penalty"):
            if isinstance(value := getattr(resolved, name, None), int):
                setattr(resolved, name, float(value))
        resolved.num_beams = 1
        return resolved


def row_streams(seed: int | None, prompts: Sequence[Sequence[int]]) -> list[random.Random]:
    """One random stream per prompt, the same for a prompt in whatever company and order it comes.

    Equal prompts get different streams, counted in their order: asking twice gives two samples.
    """
    base = random.SystemRandom().getrandbits(64) if seed is None else seed
    seen: dict[tuple[int, ...], int] = {}
    streams = []
    for prompt in prompts:
        key = tuple(prompt)
        seen[key] = seen.get(key, 0) + 1
        streams.append(random_stream(base, seen[key], key))
    return streams


def random_stream(seed: int, number: int, prompt: Sequence[int]) -> random.Random:
    """That of the `number`-th time, from 1 on, that a prompt is asked."""
    return random.Random(f"{seed}/{number}/{','.join(map(str, prompt))}")


class Chooser:
    """Picks next tokens; for a row of its own, whose prompt is `width` ids long, where it reads the ids before."""

    def __init__(
        self, model: Any, settings: GenerationConfig, terminators: Sequence[int], width: int, device: Any
    ):
        settings = copy.copy(settings)
        # What `generate` itself sets before it asks for the processors: min_new_tokens and its kin read it.
        settings._eos_token_tensor = torch.tensor(list(terminators), device=device) if terminators else None
        settings.max_length = width + settings.max_new_tokens
        self.processors = model._get_logits_processor(
            generation_config=settings, input_ids_seq_length=width, device=device
        )
        self.do_sample = bool(settings.do_sample)
        # Whether the ids before matter.
        self.reads_history = any(type(each).__name__ not in SCORES_ONLY for each in self.processors)

    def __call__(self, input_ids: Tensor, logits: Tensor, streams: Sequence[random.Random]) -> Tensor:
        """Next ids (B,) from ids so far (B, T) and logits (B, V)."""
        scores = logits.float()
        if self.processors:
            scores = self.processors(input_ids, scores)
        if not self.do_sample:
            return scores.argmax(dim=-1)
        cumulated = scores.softmax(dim=-1).cumsum(dim=-1)
        total = cumulated[:, -1:]
        # 24 bits are what fp32 holds below 1. Kept under the total, the search ends at a token whose own
        # probability lifted the sum: one that top_p or top_k removed can never be drawn.
        drawn = torch.tensor([[stream.getrandbits(24) / 2**24] for stream in streams], device=scores.device)
        target = torch.minimum(drawn * total, torch.nextafter(total, torch.zeros_like(total)))
        # Where a model has overflowed into NaN the search ends behind the vocabulary. An id from there would fail the
        # whole step, of every row, and on CUDA everything after it.
        found = torch.searchsorted(cumulated, target, right=True).squeeze(-1)
        return found.clamp_max(cumulated.shape[-1] - 1)
