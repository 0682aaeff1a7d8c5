"""Loss, perplexity and token accuracy over a whole dataset."""

from __future__ import annotations

import math

import torch
from torch import nn

from luthier.data.dataset import TokenDataset
from luthier.data.loader import make_batch
from luthier.data.packing import cut_into_passes


@torch.no_grad()
def evaluate_loss(
    policy: nn.Module,
    dataset: TokenDataset,
    *,
    tokens_per_pass: int,
    alone: bool,
    share: bool = False,
    device: torch.device,
) -> dict[str, float]:
    """Mean negative log-likelihood per trained token over the dataset, its exponential, and accuracy.

    Every trained token of the dataset counts once and alike, however long its document is.

    Returns:
        `eval_loss` (nats per token), `eval_perplexity`, `eval_token_accuracy`.
    """
    was_training = policy.training
    policy.eval()
    total = torch.zeros((), dtype=torch.float64, device="cpu")
    correct = tokens = 0
    try:
        for rows in cut_into_passes(dataset.lengths.tolist(), tokens_per_pass, alone=alone):
            batch = make_batch(dataset, rows, [0] * len(rows), device, share=share)
            logps, hits = policy(batch)
            total += (logps * batch.weight_N).double().sum().cpu()
            correct += int((hits * batch.weight_N).sum())
            tokens += int(batch.weight_N.sum())
    finally:
        policy.train(was_training)
    loss = float(-total / tokens)
    perplexity = math.exp(loss) if loss < 700 else math.inf
    return {"eval_loss": loss, "eval_perplexity": perplexity, "eval_token_accuracy": correct / tokens}
