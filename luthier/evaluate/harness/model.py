"""A model as lm-evaluation-harness asks for it: log-likelihoods, and greedy or sampled texts.

Texts become tokens as they do with the harness's own class for transformers models, so that figures can be set beside
published ones. What comes after is Luthier's: the answers to score are flat batches in which what several begin with
(worked examples, a question that has four answers) is computed once, and texts come from the engine.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from jinja2 import TemplateError
from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from transformers import GenerationConfig

from luthier.errors import DataError, RunError
from luthier.evaluate.harness.passes import Scored, batch_of, cut_into
from luthier.evaluate.progress import Progress
from luthier.evaluate.results import digest
from luthier.evaluate.store import Store
from luthier.generate.batches import cached_tokens, in_batches
from luthier.generate.engine import Engine
from luthier.generate.sampling import Sampling
from luthier.models.isolation import build_policy
from luthier.models.memory import PROBE_TOKENS, choose_budget, free_unused, is_out_of_memory
from luthier.models.policy import Policy

log = logging.getLogger("luthier")

# What the harness's own class for transformers models takes where nothing else is said.
NEW_TOKENS, WINDOW = 256, 2048
_SAMPLING = ("do_sample", "temperature", "top_p", "top_k", "repetition_penalty")


class HarnessModel(TemplateLM):
    """An opened model in the harness's terms.

    Args:
        terminators: ids that end a text. store: where answers are kept as they come, and looked up first.
        tokens_per_pass: most tokens of a forward pass; None finds it from memory. template_options: for the chat
            template, as in the run. label: what its bars are called. seed: of sampling, where a task asks for it.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        terminators: Sequence[int],
        store: Store,
        *,
        tokens_per_pass: int | None = None,
        template_options: dict[str, Any] | None = None,
        label: str = "",
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.terminators = frozenset(terminators)
        self.store = store
        self.tokens_per_pass = tokens_per_pass
        self.template_options = template_options or {}
        self.label = label
        self.seed = seed
        self._device = model.get_input_embeddings().weight.device
        self._policy: Policy | None = None
        self._proven = 0
        self._said: set[str] = set()
        model.generation_config = GenerationConfig()  # the model's own temperature and penalties have no part in this
        config = model.config.get_text_config(decoder=True)
        names = ("n_positions", "max_position_embeddings", "n_ctx")
        found = [value for name in names if (value := getattr(config, name, None)) is not None]
        unset = tokenizer.model_max_length > 2**40  # transformers' sign for "not known"
        self.max_length = int(found[0] if found else WINDOW if unset else tokenizer.model_max_length)
        self.computed = 0
        """Tokens that went through the model for log-likelihoods."""

    # --- tokens -----------------------------------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has nothing before it."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def max_gen_toks(self) -> int:
        return NEW_TOKENS

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Ids of a text, with what the tokenizer puts before texts unless the text begins with it already."""
        if add_special_tokens is None and string.startswith(self.tokenizer.decode([self.prefix_token_id])):
            add_special_tokens = False
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return list(self.tokenizer.encode(string, **options))

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as one text."""

        def apply(messages: list[dict[str, str]]) -> str:
            return str(
                self.tokenizer.apply_chat_template(
                    messages,
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                    continue_final_message=not add_generation_prompt,
                    **self.template_options,
                )
            )

        try:
            return apply(chat_history)
        except TemplateError as error:
            without = [message for message in chat_history if message["role"] != "system"]
            if len(without) == len(chat_history):
                raise DataError(f"--chat: the chat template does not take the task's messages: {error}") from error
            self._say_once(f"the chat template takes no system message: the tasks' own are left out ({error})")
            return apply(without)

    # --- log-likelihoods --------------------------------------------------------------------------------------

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-prob of whole texts, in windows of the model's context; every token is predicted once."""
        windows: list[tuple[Any, list[int], list[int]]] = []
        owner: list[int] = []
        for index, request in enumerate(requests):
            found = utils.get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for window in map(utils.make_disjoint_window, found):
                windows.append((None, *window))
                owner.append(index)
        totals = [0.0] * len(requests)
        for index, (logp, _) in zip(owner, self._loglikelihood_tokens(windows), strict=True):
            totals[index] += logp
        return totals

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """Of each answer, with what stands before it: its log-prob, and whether it is what greedy decoding gives."""
        documents = []
        for _, context, answer in requests:
            if not answer or len(answer) > self.max_length:
                raise DataError(
                    f"a task scores an answer of {len(answer)} tokens, and the model's context window has "
                    f"{self.max_length}: leave the task out"
                )
            cut = len(context) + len(answer) - self.max_length - 1
            if cut > 0:
                self._say_once(
                    f"prompts that are longer than the model's context of {self.max_length} tokens lose their beginning"
                )
            documents.append(Scored([*context, *answer][max(0, cut) :], len(answer)))
        keys = [digest({"ids": document.ids, "answer": document.answer}) for document in documents]
        self._say_known(keys)
        waiting = {key: document for key, document in zip(keys, documents, strict=True) if key not in self.store.rows}
        if waiting:
            self._score(list(waiting), list(waiting.values()))
        found = [(self.store.rows[key]["logp"], self.store.rows[key]["greedy"]) for key in keys]
        if bad := sum(not math.isfinite(logp) for logp, _ in found):
            log.warning(
                "%s: %d of %d log-probs are infinite or no numbers, and figures of them mean nothing; in fp16 large "
                "activations overflow: --dtype bf16 or fp32",
                self.label,
                bad,
                len(found),
            )
        return found

    @torch.no_grad()
    def _score(self, keys: Sequence[str], documents: Sequence[Scored]) -> None:
        """All documents, in passes; one that memory does not hold is cut in two, and so are those after it."""
        inputs = [document.inputs for document in documents]
        policy = self._policy_for(max(map(len, inputs)))
        share = not policy.why_not_shared
        budget = self.tokens_per_pass or self._find_budget(policy, documents, inputs, share)
        with Progress(f"{self.label}: scoring", len(documents)) as progress:
            while waiting := [index for index in range(len(documents)) if keys[index] not in self.store.rows]:
                some = [inputs[index] for index in waiting]
                for places in cut_into(some, budget, share=share, alone=not policy.flat):
                    rows = [waiting[place] for place in places]
                    if not self._try_pass(policy, [keys[row] for row in rows], [documents[row] for row in rows], share):
                        break
                    progress.advance(len(rows))
                else:
                    break
                if len(rows) == 1:
                    raise RunError(
                        f"out of memory in one prompt and answer of {len(documents[rows[0]].ids):,} tokens: "
                        "--dtype bf16 halves the weights, and fewer --shots make it shorter"
                    )
                free_unused(self._device)
                budget = max(1, min(budget, sum(len(inputs[row]) for row in rows)) // 2)
                log.warning("out of memory: going on with passes of up to %d tokens", budget)

    def _try_pass(self, policy: Policy, keys: Sequence[str], documents: Sequence[Scored], share: bool) -> bool:
        """False where memory does not hold it."""
        try:
            batch, entries = batch_of(documents, self._device, share=share)
            logps, hits = (each.double().cpu().numpy()[entries] for each in policy(batch))
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            return False
        self.computed += len(batch.input_ids)
        owner = np.repeat(np.arange(len(documents)), [document.answer for document in documents])
        sums, right = (np.bincount(owner, each, minlength=len(documents)) for each in (logps, hits))
        for key, document, logp, chosen in zip(keys, documents, sums.tolist(), right.tolist(), strict=True):
            self.store.add({"key": key, "logp": logp, "greedy": chosen == document.answer})
        return True

    def _policy_for(self, longest: int) -> Policy:
        """What may share a pass is proven for the longest document: some models change behind a length."""
        if self._policy is None or longest > self._proven:
            self._policy, self._proven = build_policy(self.model, None, longest), longest
        return self._policy.eval()

    def _find_budget(
        self, policy: Policy, documents: Sequence[Scored], inputs: Sequence[np.ndarray], share: bool
    ) -> int:
        if not policy.flat:
            return max(map(len, inputs))

        def run_pass() -> int:
            rows = cut_into(inputs, PROBE_TOKENS, share=share)[0]
            batch, _ = batch_of([documents[row] for row in rows], self._device, share=share)
            policy(batch)
            return len(batch.input_ids)

        everything, longest = sum(map(len, inputs)), max(map(len, inputs))
        found = choose_budget(
            policy.model, self._device, longest=longest, step_tokens=everything, run_pass=run_pass
        )
        return found.tokens

    # --- texts ------------------------------------------------------------------------------------------------

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """What the model says to each prompt, up to its first stop string."""
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(index)
        texts = [""] * len(requests)
        with Progress(f"{self.label}: answering", len(requests)) as progress:
            for indices in groups.values():
                prompts = [str(requests[index].args[0]) for index in indices]
                said = self._generate(prompts, requests[indices[0]].args[1], progress.advance)
                for index, text in zip(indices, said, strict=True):
                    texts[index] = text
        return texts

    def _generate(self, prompts: Sequence[str], options: dict[str, Any], on_done: Callable[[], None]) -> list[str]:
        asked: dict[str, Any] = dict(normalize_gen_kwargs(options, self.max_gen_toks))
        stop = [text for text in asked.pop("until") if text]
        longest = int(asked.pop("max_gen_toks"))
        if longest >= self.max_length:
            self._say_once(
                f"a task asks for answers of up to {longest} tokens, and the model's context has {self.max_length}: "
                "half of it is for the answer"
            )
            longest = max(1, self.max_length // 2)
        if left := sorted(set(asked) - set(_SAMPLING)):
            self._say_once(f"generation settings of a task that have no effect here: {', '.join(left)}")
        ids = [self.tok_encode(prompt) or [self.prefix_token_id] for prompt in prompts]
        room = self.max_length - longest
        if any(len(each) > room for each in ids):
            self._say_once(f"prompts of more than {room} tokens lose their beginning, so that the answer has room")
        sampling = Sampling(
            max_new_tokens=longest,
            stop=tuple(stop),
            seed=self.seed,
            **{name: value for name in _SAMPLING if (value := asked.get(name)) is not None},
        )
        ends = sorted(self.terminators | {self.eot_token_id} | set(self._special_ids(stop)))
        return self._in_batches([each[-room:] for each in ids], sampling, ends, on_done)

    def _in_batches(
        self, prompts: Sequence[list[int]], sampling: Sampling, ends: Sequence[int], on_done: Callable[[], None]
    ) -> list[str]:
        # A prompt that is sampled several times has as many answers; greedy ones would all be the same.
        sampled = bool(sampling.do_sample)
        places: dict[tuple[int, ...], list[str]] = {}
        settings = {**vars(sampling), "ends": list(ends), "seed": sampling.seed if sampled else None}
        keys = []
        for ids in prompts:
            times = places.setdefault(tuple(ids), [])
            if sampled or not times:
                times.append(digest({**settings, "ids": ids, "time": len(times)}))
            keys.append(times[-1])
        self._say_known(keys)
        for key in keys:
            if key in self.store.rows:
                on_done()
        # Draws depend on how often a prompt has been there: all times that it is sampled are asked for together.
        asked = [(list(ids), key, times) for ids, times in places.items() for key in times]

        def ask(waiting: list[int]) -> None:
            def keep(place: int, completion: Any) -> None:
                _, key, _ = asked[waiting[place]]
                if key not in self.store.rows:
                    self.store.add({"key": key, "text": self._text(completion.token_ids, sampling.stop)})
                    on_done()

            engine.generate([asked[index][0] for index in waiting], sampling, on_done=keep)

        def is_done(index: int) -> bool:
            return all(key in self.store.rows for key in asked[index][2])

        engine = Engine(self.model, self.tokenizer, ends, max_cached_tokens=cached_tokens(self.model))
        advice = "--dtype bf16 halves the weights, and fewer --shots make prompts shorter"
        in_batches(engine, [ids for ids, _, _ in asked], is_done, ask, advice)
        return [self.store.rows[key]["text"] for key in keys]

    def _text(self, ids: Sequence[int], stop: Sequence[str]) -> str:
        """As the harness reads an answer: by itself, not as it goes on from its prompt."""
        text = str(self.tokenizer.decode(list(ids), skip_special_tokens=True))
        for string in stop:
            text = text.split(string)[0]
        return text

    def _special_ids(self, stop: Sequence[str]) -> list[int]:
        """Stop strings that are a special token, which the text of an answer never holds."""
        special = {token.content: number for number, token in self.tokenizer.added_tokens_decoder.items()}
        return [special[string] for string in stop if string in special]

    def _say_known(self, keys: Sequence[str]) -> None:
        if known := sum(key in self.store.rows for key in keys):
            log.info("%s: %d of %d requests were answered before", self.label, known, len(keys))

    def _say_once(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            log.warning("%s", text)
