"""The loss of a model as it stands over a notebook's rows, outside of a run."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from luthier.api.rows import GivenRows
from luthier.config import Config
from luthier.data.dataset import TokenDataset, documents_of
from luthier.data.tokenizer import load_tokenizer
from luthier.evaluate.loss import evaluate_loss
from luthier.evaluate.measure import find_budget
from luthier.models.assemble import build_model
from luthier.models.device import choose_device, choose_dtype
from luthier.models.fuse import fuse_policy
from luthier.models.isolation import build_policy


def evaluate_rows(
    config: Config,
    rows: GivenRows,
    tokenizer: Any,
    model: Any,
    adapter: Mapping[str, torch.Tensor] | None,
) -> dict[str, float]:
    """`eval_loss` (nats per token), `eval_perplexity`, `eval_token_accuracy`.

    Args:
        config: of the trainer. model, adapter: as `train.run.Given` has them; the model is changed on the instance.
    """
    with tempfile.TemporaryDirectory(prefix="luthier-") as place:
        path = Path(place) / "eval.jsonl"
        rows.write(path, must_be_same=False)
        tokenizer.save_pretrained(Path(place) / "tokenizer")
        whole = rows.kind.train_on_inputs
        entry = {"path": str(path), **rows.kind.entry, **({} if whole is None else {"train_on_inputs": whole})}
        own = config.replace("evaluate()", datasets=[entry], test_datasets=None, tokenizer_config=f"{place}/tokenizer")
        device = choose_device(own.model.device_map)
        dtype = choose_dtype(own, device)
        loaded = load_tokenizer(own)
        store, _, _ = documents_of(own.data.datasets, own, loaded)
        dataset = TokenDataset(store)
        built, dropout = build_model(own, loaded, device, dtype, given=model, adapter=adapter)
        policy = build_policy(built, dropout, own.data.sequence_len)
        if own.precision.kernels == "auto":
            fuse_policy(policy)
        budget = find_budget(policy, dataset, device)
        return evaluate_loss(
            policy, dataset, tokens_per_pass=budget.tokens, alone=not policy.flat, device=device
        )
