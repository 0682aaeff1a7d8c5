"""The loss of a model as it stands over a notebook's rows, outside of a run."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from luthier.api.rows import GivenRows
from luthier.config import Config
from luthier.data.dataset import TokenDataset, documents_of
from luthier.data.loader import StepLoader
from luthier.data.tokenizer import load_tokenizer
from luthier.evaluate.loss import evaluate_loss
from luthier.evaluate.measure import find_budget
from luthier.models.adapter_files import fill_adapter
from luthier.models.assemble import build_model
from luthier.models.device import choose_device, choose_dtype
from luthier.models.fuse import fuse_policy
from luthier.models.isolation import build_policy
from luthier.models.policy import Policy
from luthier.train.distributed import Processes
from luthier.train.preferences import PreferenceTuning


def evaluate_rows(
    config: Config,
    rows: GivenRows,
    tokenizer: Any,
    model: Any,
    adapter: Mapping[str, torch.Tensor] | None,
    start: Mapping[str, torch.Tensor] | None = None,
) -> dict[str, float]:
    """`eval_loss` (nats per token), `eval_perplexity`, `eval_token_accuracy`; with `rl` the method's loss and figures.

    Args:
        config: of the trainer. model, adapter: as `train.run.Given` has them; the model is changed on the instance.
        start: the adapter that the reference has, where it is another than `adapter`; None without a reference.
    """
    with tempfile.TemporaryDirectory(prefix="luthier-") as place:
        path = Path(place) / "eval.jsonl"
        rows.write(path, must_be_same=False)
        tokenizer.save_pretrained(Path(place) / "tokenizer")
        whole = rows.kind.train_on_inputs
        entry = {"path": str(path), **rows.kind.entry, **({} if whole is None else {"train_on_inputs": whole})}
        own = config.replace("evaluate()", datasets=[entry], test_datasets=None, tokenizer_config=f"{place}/tokenizer")
        if own.preference.precompute_ref_log_probs:  # for one evaluation they are not worth keeping
            own = own.replace("evaluate()", precompute_ref_log_probs=False)
        device = choose_device(own.model.device_map)
        dtype = choose_dtype(own, device)
        loaded = load_tokenizer(own)
        store, _, _ = documents_of(own.data.datasets, own, loaded)
        dataset = TokenDataset(store)
        built, dropout = build_model(own, loaded, device, dtype, given=model, adapter=start or adapter)
        policy = build_policy(built, dropout, own.data.sequence_len)
        if own.precision.kernels == "auto":
            fuse_policy(policy)
        budget = find_budget(policy, dataset, device)
        if own.preference.rl is not None:
            figures = _of_preference(own, policy, dataset, budget.tokens, device)
            if start is not None:  # the reference is made
                fill_adapter(built, dict(adapter or {}), own.adapter.lora_modules_to_save, "the model's adapter")
            return figures(budget.tokens)
        return evaluate_loss(
            policy, dataset, tokens_per_pass=budget.tokens, alone=not policy.flat, device=device
        )


def _of_preference(
    config: Config, policy: Policy, dataset: TokenDataset, tokens_per_pass: int, device: torch.device
) -> Callable[[int], dict[str, float]]:
    """Tokens of a pass -> figures over the dataset; the reference is what the policy is now."""
    loader = StepLoader(
        dataset,
        rows_per_step=len(dataset),
        tokens_per_pass=tokens_per_pass,
        seed=config.training.seed,
        shuffle=False,
        sequence_len=config.data.sequence_len,
        alone=not policy.flat,
    )
    tuning = PreferenceTuning.prepare(
        config, policy, loader, dataset, device=device, settings=None, processes=Processes()
    )
    assert tuning.evaluate is not None
    return tuning.evaluate
