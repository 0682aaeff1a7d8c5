"""What `streaming` says beside other keys: a stream has no known length, and is read once."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

Flat = Mapping[str, Any]

# How often a stream's run saves and evaluates where nobody says: a share of its steps.
_SHARE = 0.1


def flaws(c: Flat, written: Collection[str]) -> Iterator[tuple[str, str]]:
    """Keys that a stream cannot go with, each with what to write instead."""
    if not c["streaming"]:
        return
    if c["max_steps"] is None:
        yield "streaming", "streaming: how long a stream is shows at its end only: set max_steps."
    for key, instead in (("evals_per_epoch", "eval_steps"), ("saves_per_epoch", "save_steps")):
        if key in written and c[key]:
            yield key, f"{key}: the length of a stream is not known: write {instead} in its place."
    if 0 < c["val_set_size"] < 1:
        yield (
            "val_set_size",
            f"val_set_size: {c['val_set_size']} is a fraction, and the length of a stream is not known: write how many "
            "rows, which are the first ones, or name other data in test_datasets.",
        )
    if c["mix_strategy"] == "temperature":
        yield (
            "mix_strategy",
            "`mix_strategy: temperature` goes by the sizes of the datasets, which are not known of streams: write "
            "`mix_strategy: interleave`, and a weight for each.",
        )
    if any(entry.get("epochs") is not None for entry in c["datasets"]):
        yield (
            "datasets",
            "`epochs` of a dataset needs its size, which is not known of a stream: write `mix_strategy: interleave`, "
            "and a weight for each.",
        )
    if c["mix_strategy"] == "concat" and any(entry.get("weight") not in (None, 1) for entry in c["datasets"]):
        yield (
            "datasets",
            "`mix_strategy: concat` goes through one dataset after another, and a stream is read once: weight needs "
            "`mix_strategy: interleave`.",
        )
    for key in ("dataset_exact_deduplication", "dataset_near_deduplication"):
        if c.get(key):
            yield (
                key,
                f"{key}: what a stream held before is not kept, so that repeats cannot be found: leave out {key} or "
                "streaming.",
            )
    if c["precompute_ref_log_probs"]:
        yield (
            "precompute_ref_log_probs",
            "precompute_ref_log_probs goes through all rows before the first step, which a stream cannot: leave out "
            "precompute_ref_log_probs or streaming.",
        )


def derived(c: Flat) -> dict[str, tuple[Any, str]]:
    """When a stream's run saves, where nobody says; `rules.derived` asks `evaluations` too."""
    if not c["streaming"] or c["save_steps"] is not None or c["saves_per_epoch"] is not None:
        return {}
    return {"save_steps": (_SHARE, "a tenth of the run, since the length of a stream is not known")}


def evaluations(c: Flat) -> tuple[str, Any, str]:
    """Key, value and reason of how often is evaluated where nobody says."""
    if c["streaming"]:
        return "eval_steps", _SHARE, "a tenth of the run, since the length of a stream is not known"
    return "evals_per_epoch", 1, "there is something to evaluate, and eval_steps is unset"
