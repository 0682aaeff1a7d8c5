"""Loss, perplexity and token accuracy over a whole dataset."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn

from luthier.data.batches import Batch, make_batch, spare
from luthier.data.dataset import TokenDataset
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
    lockstep: bool = False,
) -> dict[str, float]:
    """Mean negative log-likelihood per trained token over the dataset, its exponential, and accuracy.

    Every trained token of the dataset counts once and alike, however long its document is. Several processes share
    the documents between them, and all of them get the same figures.

    Args:
        rank, processes: this process, and how many there are. gather: numbers -> those of each process, in order.
        lockstep: each process runs as many passes as the one that has most (`data.loader.StepLoader`).

    Returns:
        `eval_loss` (nats per token), `eval_perplexity`, `eval_token_accuracy`.
    """
    was_training = policy.training
    policy.eval()
    total = torch.zeros((), dtype=torch.float64, device="cpu")
    correct = tokens = 0
    shares = split_evenly(dataset.lengths, processes)
    def passes_of(own: list[int]) -> list[list[int]]:
        cut = cut_into_passes(dataset.lengths[own].tolist(), tokens_per_pass, alone=alone)
        return [[own[i] for i in indices] for indices in cut]

    def batches() -> Iterator[Batch]:
        passes = passes_of(shares[rank])
        for rows in passes:
            yield make_batch(dataset, rows, [0] * len(rows), device, share=share)
        shortest = int(dataset.lengths.argmin())
        for _ in range(max(len(passes_of(share)) for share in shares) - len(passes) if lockstep else 0):
            yield spare(make_batch(dataset, [shortest], [0], device))

    try:
        for batch in batches():
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
