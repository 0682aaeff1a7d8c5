"""Preference tuning: what the log-probs of answers say about which of them the model prefers.

The log-probs of a pass are summed over each answer, compared with each other or with those of the reference, and
turned into a loss for each pair (`dpo`, `orpo`, `simpo`) or each answer (`kto`). A step's loss is the mean of these,
plus for some methods the mean negative log-likelihood of the chosen answers' tokens; both denominators are the whole
step's, so that the shares of passes and ranks add up however it was cut.

Shapes: N labels of the pass, C answers, P pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import nn

from luthier.objectives.dpo import dpo_losses
from luthier.objectives.kto import kto_losses
from luthier.objectives.orpo import orpo_losses
from luthier.objectives.simpo import simpo_losses

# (policy, batch) -> log-probs (C,) of the batch's answers under the reference, summed over tokens
Reference = Callable[[nn.Module, Any], torch.Tensor]
# A pass and what is done with it; where memory runs out in it, the step is cut anew
Guarded = Callable[[Any, Callable[[], torch.Tensor]], torch.Tensor]


def answer_logps(logp_N: torch.Tensor, completions: Any) -> torch.Tensor:
    """Log-prob (C,) of each answer, the sum over its tokens."""
    zeros = torch.zeros_like(completions.tokens_C)
    return zeros.index_add(0, completions.completion_M, logp_N[completions.entry_M])


def answer_logps_of(policy: nn.Module, batch: Any) -> torch.Tensor:
    """The same under a policy as it stands."""
    return answer_logps(policy(batch)[0], batch.completions)


@dataclass
class Pairs:
    """Objectives that compare a chosen answer with a rejected one.

    Attributes:
        settings: the config's `preference` section.
        nll_weight: weight of the mean negative log-likelihood of the chosen answers.
    """

    settings: Any
    nll_weight: float = 0.0

    # What is summed over pairs, in this order; the likelihood and its tokens come after it.
    names: ClassVar[tuple[str, ...]] = (
        "rewards/chosen",
        "rewards/rejected",
        "rewards/accuracies",
        "logps/chosen",
        "logps/rejected",
    )
    more_names: ClassVar[tuple[str, ...]] = ()

    @property
    def sums(self) -> int:
        return len(self.names) + len(self.more_names) + 3

    def begin(self, *step: Any) -> None:
        """Nothing has to be known before the first pass."""

    def __call__(self, policy: nn.Module, batch: Any, step: Any) -> tuple[torch.Tensor, torch.Tensor]:
        before = self.before(policy, batch)
        logp_N, _ = policy(batch)
        completions = batch.completions
        summed_P2 = answer_logps(logp_N, completions).view(-1, 2)
        loss_P, reward_P2, logp_P2, *more = self.compare(summed_P2, completions.tokens_C.view(-1, 2), before)
        nll = -(completions.nll_weight_N * logp_N).sum()
        loss = loss_P.sum() / len(step.rows)
        if self.nll_weight:
            loss = loss + self.nll_weight * nll / max(1, step.chosen_tokens)
        chosen, rejected = reward_P2.unbind(1)
        columns = (chosen, rejected, (chosen > rejected).float(), *logp_P2.unbind(1), *more)
        sums = [column.detach().sum() for column in columns]
        counts = (nll.detach(), completions.nll_weight_N.sum(), nll.new_tensor(float(len(loss_P))))
        return loss, torch.stack([*sums, *counts])

    def before(self, policy: nn.Module, batch: Any) -> torch.Tensor | None:
        """What has to be known of a pass before the policy's own forward."""
        return None

    def compare(
        self, summed_P2: torch.Tensor, tokens_P2: torch.Tensor, before: torch.Tensor | None
    ) -> tuple[torch.Tensor, ...]:
        """Losses (P,), rewards (P, 2), the log-probs (P, 2) that are compared, and a column (P,) for each of
        `more_names`; chosen before rejected."""
        raise NotImplementedError

    def figures(self, sums: Sequence[float]) -> dict[str, float]:
        """Means over pairs, and `nll_loss` over tokens of chosen answers."""
        *columns, nll, tokens, pairs = sums
        found = {name: total / pairs for name, total in zip((*self.names, *self.more_names), columns, strict=True)}
        found["rewards/margins"] = found["rewards/chosen"] - found["rewards/rejected"]
        return {**found, "nll_loss": nll / max(1.0, tokens)}


@dataclass
class DPO(Pairs):
    """Rewards are beta times the log ratio to the reference."""

    reference: Reference | None = None

    def before(self, policy: nn.Module, batch: Any) -> torch.Tensor | None:
        assert self.reference is not None
        return self.reference(policy, batch)

    def compare(
        self, summed_P2: torch.Tensor, tokens_P2: torch.Tensor, before: torch.Tensor | None
    ) -> tuple[torch.Tensor, ...]:
        assert before is not None
        ratio_P2 = summed_P2 - before.view(-1, 2)
        loss_P = dpo_losses(
            *ratio_P2.unbind(1),
            *tokens_P2.unbind(1),
            beta=self.settings.rl_beta,
            kind=self.settings.dpo_loss_type,
            label_smoothing=self.settings.label_smoothing,
        )
        return loss_P, self.settings.rl_beta * ratio_P2, summed_P2


class ORPO(Pairs):
    """Rewards are beta times the mean log-prob of a token; no reference."""

    more_names = ("log_odds_chosen", "log_odds_ratio")

    def compare(
        self, summed_P2: torch.Tensor, tokens_P2: torch.Tensor, before: torch.Tensor | None
    ) -> tuple[torch.Tensor, ...]:
        mean_P2 = summed_P2 / tokens_P2
        beta = self.settings.rl_beta
        loss_P, log_odds_P = orpo_losses(*mean_P2.unbind(1), beta=beta)
        return loss_P, beta * mean_P2, mean_P2, log_odds_P, -loss_P / beta


class SimPO(Pairs):
    """Rewards are beta times the mean log-prob of a token; no reference."""

    def compare(
        self, summed_P2: torch.Tensor, tokens_P2: torch.Tensor, before: torch.Tensor | None
    ) -> tuple[torch.Tensor, ...]:
        mean_P2 = summed_P2 / tokens_P2
        loss_P = simpo_losses(
            *mean_P2.unbind(1),
            beta=self.settings.rl_beta,
            gamma=self.settings.simpo_gamma,
            label_smoothing=self.settings.label_smoothing,
        )
        return loss_P, self.settings.rl_beta * mean_P2, mean_P2


@dataclass
class KTO:
    """Answers that are desirable or not, each for itself; what tells much from little is how far the policy is from
    its reference on answers to other prompts, the same number for a whole step.

    Attributes:
        reference: of the answers of rows. live: the same, of any answers.
        add_up: adds a number up over all processes.
    """

    settings: Any
    reference: Reference
    live: Reference
    add_up: Callable[[torch.Tensor], torch.Tensor]
    kl: torch.Tensor | None = None

    names: ClassVar[tuple[str, ...]] = (
        "rewards/chosen",
        "rewards/rejected",
        "logps/chosen",
        "logps/rejected",
        "right",
        "kl",
        "desirable",
        "undesirable",
    )
    sums: ClassVar[int] = len(names)

    @torch.no_grad()
    def begin(self, policy: nn.Module, mismatched: Iterable[Any], step: Any, guarded: Guarded) -> None:
        """Estimate the divergence of a step (Ethayarajh et al. 2024, section 4.1), without gradient and dropout."""
        was_training = policy.training
        total = torch.zeros((), device=next(policy.parameters()).device)
        policy.eval()
        try:
            for batch in mismatched:
                ratio = guarded(batch, partial(self._ratio, policy, batch))
                total = total if batch.spare else total + ratio
        except Exception:
            self.add_up(total * torch.nan)  # the other processes wait for it
            raise
        finally:
            policy.train(was_training)
        self.kl = (self.add_up(total) / len(step.rows)).clamp_min(0)

    def __call__(self, policy: nn.Module, batch: Any, step: Any) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.kl is not None
        completions, beta = batch.completions, self.settings.rl_beta
        desirable_C = completions.desirable_C
        before_C = self.reference(policy, batch)
        summed_C = answer_logps_of(policy, batch)
        ratio_C = summed_C - before_C
        loss_C = kto_losses(
            ratio_C,
            desirable_C,
            self.kl,
            beta=beta,
            desirable_weight=self.settings.kto_desirable_weight,
            undesirable_weight=self.settings.kto_undesirable_weight,
        )
        reward_C, logp_C = beta * ratio_C.detach(), summed_C.detach()
        right_C = (ratio_C.detach() > self.kl) == desirable_C
        yes, no = desirable_C.float(), (~desirable_C).float()
        answers = float(len(loss_C))
        columns = (reward_C * yes, reward_C * no, logp_C * yes, logp_C * no, right_C.float())
        sums = [column.sum() for column in columns]
        return loss_C.sum() / len(step.rows), torch.stack([*sums, self.kl * answers, yes.sum(), no.sum()])

    def figures(self, sums: Sequence[float]) -> dict[str, float]:
        """Means over the desirable (`chosen`) and the undesirable answers (`rejected`); those that a window has none
        of are left out. An answer counts as accurate where its reward is on its side of the divergence."""
        found = dict(zip(self.names, sums, strict=True))
        right, kl, desirable, undesirable = (found.pop(name) for name in ("right", "kl", "desirable", "undesirable"))
        counts = {"chosen": desirable, "rejected": undesirable}
        means = {name: total / n for name, total in found.items() if (n := counts[name.split("/")[1]])}
        if desirable and undesirable:
            means["rewards/margins"] = means["rewards/chosen"] - means["rewards/rejected"]
        answers = desirable + undesirable
        return {**means, "rewards/accuracies": right / answers, "kl": kl / answers}

    def _ratio(self, policy: nn.Module, batch: Any) -> torch.Tensor:
        return (answer_logps_of(policy, batch) - self.live(policy, batch)).sum()


def preference(
    settings: Any,
    reference: Reference | None,
    live: Reference | None,
    add_up: Callable[[torch.Tensor], torch.Tensor],
) -> Pairs | KTO:
    """The objective that a config's `preference` section asks for.

    Args:
        reference: of the answers of a dataset's rows; None for methods that have none. live: of any answers.
        add_up: adds a number up over all processes.
    """
    if settings.rl == "orpo":
        return ORPO(settings, nll_weight=1.0)
    if settings.rl == "simpo":
        return SimPO(settings, nll_weight=settings.cpo_alpha)
    assert reference is not None and live is not None
    if settings.rl == "kto":
        return KTO(settings, reference, live, add_up)
    return DPO(settings, nll_weight=settings.rpo_alpha or 0.0, reference=reference)
