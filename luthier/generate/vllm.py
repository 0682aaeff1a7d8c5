"""vLLM in place of our engine, for a file of prompts on a GPU that it supports.

The prompts are the same ids, the sampling parameters the same values, and an adapter is applied beside its base by
vLLM's own LoRA. vLLM hands its answers out when all that it was given are done, so it gets them in portions.

Interface: vLLM's documentation of offline inference (`LLM`, `SamplingParams`, `LoRARequest`).
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.artifacts.source import local
from luthier.errors import ConfigError, ModelError
from luthier.generate.asking import LONGEST, own_defaults
from luthier.generate.rows import Completion
from luthier.generate.sampling import Sampling, random_stream

if TYPE_CHECKING:
    from luthier.generate.asking import Asking
    from luthier.generate.files import Job
    from luthier.models.assemble import Found

log = logging.getLogger("luthier")

PORTION = 512  # prompts of a call: what an interrupted command may lose
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM takes as its largest
# Of a model's own sampling parameters, those that are handed on; others are said.
HANDED_ON = {"do_sample", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_new_tokens"}
NOT_OF_SAMPLING = {"bos_token_id", "eos_token_id", "pad_token_id", "max_length", "transformers_version", "num_beams",
                   "use_cache", "cache_implementation", "_from_model_config"}  # fmt: skip


def check_installed() -> None:
    """ConfigError: it is not."""
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError(
            "--engine vllm: vLLM is not installed: `pip install vllm`, best into an environment of its own (it brings "
            "its own version of torch), or leave --engine out"
        )


class Vllm:
    """A model in vLLM.

    Raises:
        ModelError: vLLM has no form for how the adapter was trained.
    """

    def __init__(self, found: Found, asking: Asking, sampling: Sampling, seed: int) -> None:
        from vllm import LLM

        from luthier.data.tokenizer import terminator_ids
        from luthier.generate.engine import default_terminators
        from luthier.models.assemble import tokenizer_of
        from luthier.models.load import read_model_config

        self.seed, self.stop = seed, list(sampling.stop)
        stand_in, tokenizer = own_defaults(found), tokenizer_of(found)
        self.settings = sampling.resolve(stand_in, LONGEST)
        self.terminators = sorted({*terminator_ids(tokenizer, asking.config), *default_terminators(stand_in)})
        self._say_what_is_not_handed_on()
        values: dict[str, Any] = {
            "model": local(found.base),
            "revision": found.loading.model.revision,
            "trust_remote_code": found.loading.model.trust_remote_code,
            **_storage(found),
        }
        own_tokenizer = found.folder is not None and (found.folder / "tokenizer_config.json").is_file()
        values["tokenizer"] = str(found.folder) if own_tokenizer else local(found.base)
        self.adapter: Any = None
        if found.is_adapter and found.folder is not None:
            from vllm.lora.request import LoRARequest

            values |= {"enable_lora": True, "max_lora_rank": _largest_rank(found.folder)}
            self.adapter = LoRARequest(found.folder.resolve().name, 1, str(found.folder.resolve()))
        config = read_model_config(found.loading.model)
        self.window: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
        self.llm = LLM(**values)

    def _say_what_is_not_handed_on(self) -> None:
        own = set(self.settings.to_diff_dict()) - HANDED_ON - NOT_OF_SAMPLING
        if own:
            log.warning("of the model's own sampling parameters vLLM does not get: %s", ", ".join(sorted(own)))

    def why_not(self, prompt_ids: Sequence[int]) -> str | None:
        if not len(prompt_ids):
            return "is empty: generation needs at least one token to start from"
        if self.window is not None and len(prompt_ids) >= self.window:
            return f"has {len(prompt_ids)} tokens and the model's context window {self.window}: shorten it"
        return None

    def answer(self, jobs: Sequence[Job], on_done: Callable[[Job, Completion], None]) -> None:
        for start in range(0, len(jobs), PORTION):
            portion = jobs[start : start + PORTION]
            found = self.llm.generate(
                [{"prompt_token_ids": job.ids.tolist()} for job in portion],
                [self._parameters(job) for job in portion],
                use_tqdm=False,
                lora_request=self.adapter,
            )
            for job, request in zip(portion, found, strict=True):
                out = request.outputs[0]
                reason = "stop" if out.finish_reason == "stop" else "length"
                on_done(job, Completion(job.ids.tolist(), list(out.token_ids), out.text, reason))

    def _parameters(self, job: Job) -> Any:
        from vllm import SamplingParams

        settings = self.settings
        room = settings.max_new_tokens
        if self.window is not None:
            room = min(room, self.window - len(job.ids))
        sampled = settings.do_sample
        return SamplingParams(
            max_tokens=room,
            temperature=settings.temperature if sampled else 0.0,
            top_p=settings.top_p if sampled else 1.0,
            top_k=(settings.top_k or -1) if sampled else -1,
            min_p=(settings.min_p or 0.0) if sampled else 0.0,
            repetition_penalty=settings.repetition_penalty or 1.0,
            stop=self.stop or None,
            stop_token_ids=self.terminators,
            # A seed for each answer: none depends on the others of its batch.
            seed=random_stream(self.seed, job.number, job.ids).getrandbits(31) if sampled else None,
        )


def _storage(found: Found) -> dict[str, Any]:
    """As the run stored its base."""
    if found.loading.model.load_in_8bit:
        raise ModelError(f"{found.folder}: vLLM does not load a base in 8 bits: merge it first (`luthier merge-lora`)")
    return {"quantization": "bitsandbytes"} if found.loading.model.load_in_4bit else {}


def _largest_rank(folder: Path) -> int:
    """What vLLM has to make room for."""
    from luthier.models.adapter_files import read_adapter_config

    found = read_adapter_config(folder)
    if found.get("use_dora") or found.get("modules_to_save") or found.get("target_parameters"):
        raise ModelError(
            f"{folder}: vLLM's adapters are plain LoRA on linear layers; merge it first (`luthier merge-lora`) and ask "
            "the merged model"
        )
    rank = max([found["r"], *(found.get("rank_pattern") or {}).values()])
    for largest in RANKS:
        if rank <= largest:
            return largest
    raise ModelError(f"{folder}: rank {rank} is above vLLM's largest, {RANKS[-1]}: merge it first")
