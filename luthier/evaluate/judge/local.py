"""A judge that is a model on this machine.

It is not asked to write: small models seldom write valid JSON, and their arguments explain little. Its verdict is the
likeliest of the three choices as the text that follows the question, which every model has and which is exact; in
place of an argument stand their probabilities.
"""

from __future__ import annotations

import inspect
import itertools

import torch

from luthier.evaluate.judge.answers import Prompt, open_engine
from luthier.evaluate.judge.client import PairFailed
from luthier.evaluate.judge.question import FIRST, SECOND, TIE, Verdict


class LocalJudge:
    """A model that judges by the likelihood of its choices. ModelError: nothing loadable there."""

    def __init__(self, target: str) -> None:
        self.model = target
        self._engine, self._ids_of = open_engine(target)
        parameters = inspect.signature(self._engine.model.forward).parameters
        self._takes_keep = "logits_to_keep" in parameters

    def ask(self, text: str) -> Verdict:
        """The likeliest choice after the message. PairFailed: it does not fit into the context window."""
        ids = self._ids_of(Prompt(text, text))
        if reason := self._engine.why_not(ids):
            failed = PairFailed(f"the question to the judge {reason}")
            failed.refused = True
            raise failed
        log_p = self._log_likelihoods(ids)
        share = torch.softmax(torch.tensor([log_p[choice] for choice in (TIE, FIRST, SECOND)]), 0).tolist()
        choice = max(log_p, key=lambda each: log_p[each])
        argument = f"probabilities: answer 1 {share[FIRST]:.3f}, answer 2 {share[SECOND]:.3f}, neither {share[TIE]:.3f}"
        return Verdict(choice, argument, tokens_in=len(ids), model=self.model)

    def _log_likelihoods(self, ids: list[int]) -> dict[int, float]:
        """Choice -> log-likelihood of its text behind `ids`, in nats. Where the choices differ in one token, which is
        nearly always, the question is read once."""
        tokenizer = self._engine.tokenizer
        # Behind text that does not end in white space a space comes first, as in running text.
        space = "" if str(tokenizer.decode(ids[-1:]))[-1:].isspace() else " "
        endings = {
            choice: list(tokenizer(f"{space}{choice}", add_special_tokens=False)["input_ids"])
            for choice in (TIE, FIRST, SECOND)
        }
        together = zip(*endings.values(), strict=False)
        shared = [same for same, *_ in itertools.takewhile(lambda ids: len(set(ids)) == 1, together)]
        tails = {choice: ending[len(shared) :] for choice, ending in endings.items()}
        if all(len(tail) == 1 for tail in tails.values()):
            log_p_V = self._log_probs([*ids, *shared], 1)[0]
            return {choice: float(log_p_V[tail[0]]) for choice, tail in tails.items()}
        found = {}
        for choice, ending in endings.items():
            log_p_TV = self._log_probs([*ids, *ending[:-1]], len(ending))
            found[choice] = float(log_p_TV.gather(-1, torch.tensor(ending)[:, None]).sum())
        return found

    @torch.no_grad()
    def _log_probs(self, ids: list[int], last: int) -> torch.Tensor:
        """(last, V) log-probs of what follows each of the last positions, on the CPU."""
        model = self._engine.model
        device = model.get_input_embeddings().weight.device
        keep = {"logits_to_keep": last} if self._takes_keep else {}
        logits_TV = model(input_ids=torch.tensor([ids], device=device), use_cache=False, **keep).logits[0, -last:]
        return torch.log_softmax(logits_TV.float(), -1).cpu()
