"""Loss, perplexity and token accuracy over a whole dataset."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import nn

from luthier.data.dataset import TokenDataset
from luthier.data.loader import make_batch
from luthier.data.packing import cut_into_passes, split_evenly
from luthier.data.tree import Sharing


@torch.no_grad()
def evaluate_loss(
    policy: nn.Module,
    dataset: TokenDataset,
    *,
    tokens_per_pass: int,
    alone: bool,
    share: Sharing = "",
    device: torch.device,
    rank: int = 0,
    processes: int = 1,
    gather: Callable[[Sequence[float]], list[list[float]]] = lambda values: [list(values)],
) -> dict[str, float]:
    """Mean negative log-likelihood per trained token over the dataset, its exponential, and accuracy.

    Every trained token of the dataset counts once and alike, however long its document is. Several processes share
    the documents between them, and all of them get the same figures.

    Args:
        rank, processes: this process, and how many there are. gather: numbers -> those of each process, in order.

    Returns:
        `eval_loss` (nats per token), `eval_perplexity`, `eval_token_accuracy`.
    """
    was_training = policy.training
    policy.eval()
    total = torch.zeros((), dtype=torch.float64, device="cpu")
    correct = tokens = 0
    own = split_evenly(dataset.lengths, processes)[rank]
    try:
        for pass_ in cut_into_passes(dataset.lengths[own].tolist(), tokens_per_pass, alone=alone):
            rows = [own[i] for i in pass_]
            batch = make_batch(dataset, rows, [0] * len(rows), device, share=share)
            logps, hits = policy(batch)
            total += (logps * batch.weight_N).double().sum().cpu()
            correct += int((hits * batch.weight_N).sum())
            tokens += int(batch.weight_N.sum())
    finally:
        policy.train(was_training)
    total_sum, correct_sum, token_sum = map(sum, zip(*gather([float(total), correct, tokens]), strict=True))
    loss = -total_sum / token_sum
    perplexity = math.exp(loss) if loss < 700 else math.inf
    return {"eval_loss": loss, "eval_perplexity": perplexity, "eval_token_accuracy": correct_sum / token_sum}
