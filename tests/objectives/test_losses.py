"""The losses against TRL's own lines, run live on given log-probs, and what must hold of them at the extremes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import log
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch

from luthier.config.preference import DPOLoss
from luthier.objectives.dpo import KINDS, dpo_losses
from luthier.objectives.kto import kto_losses
from luthier.objectives.orpo import _log1mexp, orpo_losses
from luthier.objectives.simpo import simpo_losses

# Differences of log-probs from none to hundreds of nats, of both signs and in every combination of sides.
RATIOS = torch.cartesian_prod(
    *[torch.tensor([-300.0, -30.0, -3.0, -0.2, 0.0, 1e-4, 0.5, 8.0, 40.0, 300.0])] * 2
)
# Mean log-probs from nearly certain to hopeless, on both sides of log 1/2.
MEANS = torch.cartesian_prod(*[torch.tensor([-1e-5, -1e-3, -0.1, -0.69, -0.7, -2.0, -11.0, -60.0])] * 2)
SMOOTHED = {"robust": 0.2, "exo_pair": 0.01}
TOKENS = (3, 7)

Losses = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def test_every_loss_of_the_config_is_there() -> None:
    assert set(KINDS) == set(get_args(DPOLoss))


@pytest.mark.parametrize("beta", [0.1, 0.7])
@pytest.mark.parametrize("kind", KINDS)
def test_dpo_is_trl(kind: str, beta: float) -> None:
    smoothing = SMOOTHED.get(kind, 0.0)
    ours = partial(_dpo, kind=kind, beta=beta, label_smoothing=smoothing)
    theirs = partial(_trl_dpo, kind=kind, beta=beta, label_smoothing=smoothing)
    ratios = RATIOS
    if kind == "discopop":  # below -88 TRL's exponential overflows, and its loss is not a number
        ratios = ratios[beta * (ratios[:, 0] - ratios[:, 1]) > -85]
    _same(ours, theirs, ratios)


def test_smoothed_dpo_and_simpo_are_trl() -> None:
    """TRL's smoothing of the sigmoid is in CPOTrainer; its SimPO without a margin is DPO on log ratios."""
    from trl.experimental.cpo import CPOTrainer

    def theirs(chosen: torch.Tensor, rejected: torch.Tensor, *, gamma: float, beta: float) -> torch.Tensor:
        trainer = SimpleNamespace(
            alpha=0.0, beta=beta, simpo_gamma=gamma, label_smoothing=smoothing, loss_type="simpo",
            accelerator=SimpleNamespace(device="cpu"),
        )  # fmt: skip
        return CPOTrainer.cpo_loss(trainer, chosen, rejected)[0]

    for smoothing in (0.0, 0.1):
        _same(
            partial(_dpo, kind="sigmoid", beta=0.1, label_smoothing=smoothing),
            partial(theirs, gamma=0.0, beta=0.1),
            RATIOS,
        )
        _same(
            partial(simpo_losses, beta=2.0, gamma=1.4, label_smoothing=smoothing),
            partial(theirs, gamma=1.4, beta=2.0),
            MEANS,
        )


def test_orpo_is_trl() -> None:
    from trl.experimental.orpo import ORPOTrainer

    trainer = SimpleNamespace(beta=0.25, accelerator=SimpleNamespace(device="cpu"))
    _same(
        lambda c, r: orpo_losses(c, r, beta=0.25)[0],
        lambda c, r: -ORPOTrainer.odds_ratio_loss(trainer, c, r)[0],
        MEANS,
    )
    theirs = ORPOTrainer.odds_ratio_loss(trainer, MEANS[:, 0], MEANS[:, 1])
    _, log_odds = orpo_losses(MEANS[:, 0], MEANS[:, 1], beta=0.25)
    torch.testing.assert_close(log_odds.mean(), theirs[4])


@pytest.mark.parametrize("mismatched", [[-4.0, 1.0], [2.0, 9.0]], ids=["clamped", "positive"])
def test_kto_is_trl(mismatched: list[float]) -> None:
    """The estimate of the KL divergence included: TRL's is made by the same lines, from the mismatched answers."""
    ratios = torch.tensor([-300.0, -30.0, -0.2, 0.0, 3.0, 300.0] * 2, requires_grad=True)
    desirable = torch.arange(12) < 6
    loss, kl, gradient = _trl_kto(ratios, desirable, torch.tensor(mismatched), (1.3, 0.6))
    assert kl == max(0.0, sum(mismatched) / 2)
    ours = kto_losses(
        ratios, desirable, torch.tensor(kl), beta=0.1, desirable_weight=1.3, undesirable_weight=0.6
    )
    torch.testing.assert_close(ours.mean(), loss, rtol=1e-6, atol=1e-7)  # TRL's 1 - sigmoid(x) rounds at 6e-8
    torch.testing.assert_close(_gradient(ours.mean(), ratios), gradient, rtol=1e-5, atol=1e-9)


def test_kto_takes_no_gradient_through_the_divergence() -> None:
    ratios, kl = torch.zeros(2, requires_grad=True), torch.tensor(1.0, requires_grad=True)
    kto_losses(ratios, torch.tensor([True, False]), kl, beta=0.1).sum().backward()
    assert kl.grad is None and ratios.grad is not None
    assert ratios.grad[0] < 0 < ratios.grad[1]


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_dpo(kind: str) -> None:
    """Against differences of the loss itself, fp64."""
    both = [torch.linspace(-5, 7, 6, dtype=torch.float64)[i].requires_grad_() for i in (1, 4)]
    loss = partial(_dpo, kind=kind, beta=0.3, label_smoothing=SMOOTHED.get(kind, 0.0))
    assert torch.autograd.gradcheck(loss, [x.reshape(1) for x in both])


def test_gradients_of_the_others() -> None:
    means = [x.double().clone().requires_grad_() for x in MEANS[MEANS.max(1).values < -5e-4].T]
    check = partial(torch.autograd.gradcheck, eps=1e-7, atol=1e-4, rtol=1e-4)
    assert check(lambda c, r: orpo_losses(c, r, beta=0.1)[0], means)
    assert check(partial(simpo_losses, beta=2.0, gamma=1.0, label_smoothing=0.1), means)
    ratios = torch.linspace(-20, 20, 8, dtype=torch.float64).requires_grad_()
    kl = torch.tensor(0.5, dtype=torch.float64)
    assert check(lambda r: kto_losses(r, torch.arange(8) % 2 == 0, kl, beta=0.2), [ratios])


@pytest.mark.parametrize("kind", KINDS)
def test_dpo_is_finite_far_out(kind: str) -> None:
    """A long answer's log-probs may differ by thousands of nats; the losses that grow, grow at most as a square."""
    far = torch.tensor([-1e5, -4e3, 0.0, 4e3, 1e5])
    loss = partial(_dpo, kind=kind, beta=0.5, label_smoothing=SMOOTHED.get(kind, 0.0))
    values, gradients = _values(loss, torch.cartesian_prod(far, far))
    assert values.isfinite().all() and gradients.isfinite().all()


def test_the_others_are_finite_far_out() -> None:
    """Probabilities of one and of nothing included, and the wrong answer certain."""
    edge = torch.cartesian_prod(*[torch.tensor([0.0, -1e-9, -1e-7, -1e-3, -1.0, -200.0, -1e5])] * 2)
    for loss in (lambda c, r: orpo_losses(c, r, beta=0.1)[0], partial(simpo_losses, beta=2.0, gamma=1.0)):
        values, gradients = _values(loss, edge)
        assert values.isfinite().all() and gradients.isfinite().all()
    _, log_odds = orpo_losses(edge[:, 0], edge[:, 1], beta=0.1)
    assert (log_odds[edge[:, 0] > edge[:, 1]] >= 0).all()


def test_small_numbers_are_accurate() -> None:
    """Relatively, fp32 against fp64: odds and 1 - p near certainty and near nothing, and the rest of a loss that is
    almost gone."""
    close = partial(torch.testing.assert_close, rtol=1e-5, atol=0.0)
    x = -torch.logspace(-6, 1.7, 60)
    exact = x.double()
    complement = torch.where(exact > -1, (-exact.expm1()).log(), (-exact.exp()).log1p())
    close(_log1mexp(x), complement.float())
    _, log_odds = orpo_losses(x, torch.full_like(x, -60.0), beta=0.1)
    close(log_odds, (exact - complement + 60).float())
    gains = torch.linspace(0, 60, 13)
    close(kto_losses(gains, torch.ones(13).bool(), torch.tensor(0.0), beta=1.0), torch.sigmoid(-gains))
    close(kto_losses(-gains, torch.zeros(13).bool(), torch.tensor(0.0), beta=1.0), torch.sigmoid(-gains))
    close(_dpo(gains, -gains, kind="apo_zero", beta=1.0), 2 * torch.sigmoid(-gains))


def test_where_policy_and_reference_agree() -> None:
    """The start of a run: log 2 where the loss is a logistic of the margin, 1/2 for every answer of KTO."""
    nothing = torch.zeros(3)
    for kind in ("sigmoid", "robust", "sigmoid_norm"):
        loss = _dpo(nothing, nothing, kind=kind, beta=0.1, label_smoothing=0.1)
        torch.testing.assert_close(loss, torch.full((3,), log(2)))
    halves = kto_losses(nothing, torch.tensor([True, False, True]), torch.tensor(0.0), beta=0.1)
    assert halves.tolist() == [0.5] * 3
    same = torch.full((3,), -1.5)
    loss, log_odds = orpo_losses(same, same, beta=0.1)
    torch.testing.assert_close(loss, torch.full((3,), 0.1 * log(2)))
    assert log_odds.tolist() == [0.0] * 3
    torch.testing.assert_close(simpo_losses(same, same, beta=2.0, gamma=0.0), torch.full((3,), log(2)))


def test_exo_pair_needs_smoothing() -> None:
    with pytest.raises(ValueError, match="label_smoothing"):
        _dpo(torch.zeros(1), torch.zeros(1), kind="exo_pair", beta=0.1)


def _dpo(chosen: torch.Tensor, rejected: torch.Tensor, **options: Any) -> torch.Tensor:
    lengths = [torch.full(chosen.shape, n) for n in TOKENS]
    return dpo_losses(chosen, rejected, *lengths, **options)


def _same(ours: Losses, theirs: Losses, pairs_P2: torch.Tensor) -> None:
    """Values and gradients of both answers, pair by pair."""
    for one, other in zip(_values(ours, pairs_P2), _values(theirs, pairs_P2), strict=True):
        torch.testing.assert_close(one, other, rtol=2e-6, atol=2e-7)  # a few roundings in fp32


def _values(loss: Losses, pairs_P2: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    sides = [side.clone().requires_grad_() for side in pairs_P2.T]
    losses = loss(*sides)
    return losses.detach(), torch.stack(torch.autograd.grad(losses.sum(), sides))


def _gradient(loss: torch.Tensor, of: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(loss, of)[0]


class _Gathering:
    """Of accelerate's Accelerator what the trainers' losses use, in one process."""

    device = torch.device("cpu")

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        return x

    gather_for_metrics = gather


class _Metrics(dict[str, Any]):
    def __missing__(self, key: str) -> Any:
        self[key] = [] if "/" in key or key in ("kl", "entropy", "mean_token_accuracy") else _Metrics()
        return self[key]


def _trainer(**options: Any) -> SimpleNamespace:
    """What `_compute_loss` of TRL's trainers reads from the trainer, the model being a function."""
    return SimpleNamespace(
        model=SimpleNamespace(training=True), accelerator=_Gathering(), aux_loss_enabled=False,
        precompute_ref_logps=True, _metrics=_Metrics(), _total_train_tokens=0, _tp_size=1, **options,
    )  # fmt: skip


def _outputs(logp_B: torch.Tensor, length: int) -> SimpleNamespace:
    """A model's outputs whose log-probs add up to those given."""
    logps = torch.nn.functional.pad(logp_B[:, None], (length - 2, 0))
    nothing = torch.zeros_like(logps)
    return SimpleNamespace(log_probs=logps, entropy=nothing, mean_logits=nothing, is_top1=nothing.bool())


def _trl_dpo(
    chosen: torch.Tensor, rejected: torch.Tensor, *, kind: str, beta: float, label_smoothing: float
) -> torch.Tensor:
    """DPOTrainer's loss of each pair, as of a batch of that pair alone."""
    from trl import DPOTrainer

    trainer = _trainer(
        loss_types=[kind], loss_weights=[1.0], beta=beta, label_smoothing=label_smoothing, ld_alpha=None,
        f_divergence_type="reverse_kl", use_weighting=False, args=SimpleNamespace(discopop_tau=0.05),
    )  # fmt: skip
    length = 1 + max(TOKENS)
    mask = torch.stack([(torch.arange(length) >= length - n).long() for n in TOKENS])
    batch = {
        "input_ids": torch.zeros(2, length, dtype=torch.long),
        "attention_mask": torch.ones(2, length, dtype=torch.long),
        "completion_mask": mask,
        "ref_chosen_logps": torch.tensor([-50.0], dtype=torch.float64),
        "ref_rejected_logps": torch.tensor([-80.0], dtype=torch.float64),
    }

    def loss(c: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
        # in fp64 until the reference is taken off again, so that the log ratios are those given
        logps = torch.stack([c.double() - 50, r.double() - 80])
        return DPOTrainer._compute_loss(
            trainer, lambda **_: _outputs(logps, length), batch, return_outputs=False
        )

    return torch.stack([loss(c, r) for c, r in zip(chosen, rejected, strict=True)]).to(chosen.dtype)


def _trl_kto(
    ratios: torch.Tensor, desirable: torch.Tensor, mismatched: torch.Tensor, weights: tuple[float, float]
) -> tuple[torch.Tensor, float, torch.Tensor]:
    """KTOTrainer's loss of a batch, its estimate of the KL divergence and the loss's gradient."""
    from trl import KTOTrainer

    trainer = _trainer(
        loss_type="kto", calculate_KL=True, beta=0.1, desirable_weight=weights[0], undesirable_weight=weights[1],
    )  # fmt: skip
    trainer._compute_kl_logps = partial(KTOTrainer._compute_kl_logps, trainer)
    rows, length = len(ratios), 4
    mask = torch.tensor([[0, 0, 1, 1]]).expand(rows, length)
    kl_rows = len(mismatched)
    batch = {
        "label": desirable,
        "input_ids": torch.zeros(rows, length, dtype=torch.long),
        "attention_mask": torch.ones(rows, length, dtype=torch.long),
        "completion_mask": mask,
        "KL_input_ids": torch.ones(kl_rows, length, dtype=torch.long),
        "KL_attention_mask": torch.ones(kl_rows, length, dtype=torch.long),
        "KL_completion_mask": mask[:kl_rows],
        "ref_logps": torch.zeros(rows),
        "ref_KL_logps": torch.full((kl_rows,), -6.0),
    }

    def model(input_ids: torch.Tensor, **_: Any) -> SimpleNamespace:
        return _outputs(mismatched - 6 if input_ids.any() else ratios, length)

    loss = KTOTrainer._compute_loss(trainer, model, batch, return_outputs=False)
    return loss.detach(), trainer._metrics["train"]["kl"][0], _gradient(loss, ratios)
