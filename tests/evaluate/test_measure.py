"""Sums of single documents against transformers' own loss, however the passes are cut, and where memory ends."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from luthier.config import Config
from luthier.data.held_out import held_out
from luthier.errors import RunError
from luthier.evaluate.figures import RowFigures, all_figures
from luthier.evaluate.labelled import score_labelled
from luthier.evaluate.measure import find_budget, score_documents
from luthier.models.isolation import build_policy
from luthier.models.load import use_flat_attention
from luthier.models.policy import Policy
from tests.models.families import toy_model

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory, toy_tokenizer: Any) -> Any:
    folder = tmp_path_factory.mktemp("rows")
    rows = folder / "rows.jsonl"
    some = [{"instruction": f"Say {'9 ' * n}", "output": f"{'word ' * (n % 7)}."} for n in range(24)]
    rows.write_text("".join(json.dumps(row) + "\n" for row in some))
    config = Config.from_flat(
        {
            "base_model": "toy",
            "datasets": [{"path": str(rows), "type": "alpaca"}],
            "dataset_prepared_path": str(folder / "cache"),
        }
    )
    return held_out(config, toy_tokenizer).documents


@torch.no_grad()
def by_transformers(model: Any, documents: Any) -> list[float]:
    """Summed loss of each document, from the model's own loss."""
    found = []
    for n in range(len(documents)):
        ids, labels = (torch.from_numpy(np.asarray(each, np.int64))[None] for each in documents[n][:2])
        found.append(float(model(input_ids=ids, labels=labels, use_cache=False).loss) * int(documents.trained[n]))
    return found


# A plain head, a soft cap with sliding windows, tied absolute positions; and two that take one document per pass.
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "bloom", "mamba"])
def test_each_document_has_the_loss_that_transformers_gives_it(family: str, documents: Any) -> None:
    model = toy_model(family, vocab_size=512)
    expected = by_transformers(model, documents)
    use_flat_attention(model)
    policy = build_policy(model, None, 512)
    assert policy.flat is (family not in ("bloom", "mamba"))
    for tokens in (1, 200, 100_000):
        scores = score_documents(policy, documents, CPU, tokens_per_pass=tokens)
        assert scores.nll / scores.tokens == pytest.approx(np.array(expected) / documents.trained, abs=1e-5)
        assert (scores.tokens == documents.trained).all() and (scores.correct <= scores.tokens).all()
    budget = find_budget(policy, documents, CPU)
    most = documents.lengths.sum() if policy.flat else documents.lengths.max()
    assert documents.lengths.max() <= budget.tokens <= most


class Small(Policy):
    """Memory for passes of so many tokens."""

    room, words = 10**9, torch.OutOfMemoryError("CUDA out of memory")
    largest = 0

    def forward(self, batch: Any) -> Any:
        if len(batch.input_ids) > self.room:
            raise self.words
        self.largest = max(self.largest, len(batch.input_ids))
        return super().forward(batch)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_what_memory_does_not_hold_is_done_in_smaller_passes_and_that_is_said(
    error: Exception, documents: Any, caplog: pytest.LogCaptureFixture
) -> None:
    policy = Small(toy_model("gpt2", vocab_size=512), flat=False)
    longest = int(documents.lengths.max())
    expected = score_documents(policy, documents, CPU, tokens_per_pass=3 * longest)
    policy.flat = True  # the cut's affair alone: each document still runs by itself
    policy.hidden = lambda *given, **rows: Policy(policy.model, flat=False).hidden(*given, **rows)  # type: ignore[method-assign]
    policy.room, policy.words = longest, error
    done: list[int] = []
    with caplog.at_level(logging.WARNING, "luthier"):
        scores = score_documents(policy, documents, CPU, tokens_per_pass=3 * longest, on_done=done.append)
    assert scores.nll == pytest.approx(expected.nll, abs=1e-4)
    assert sum(done) == len(documents) and policy.largest <= policy.room
    assert f"out of memory with passes of up to {3 * longest} tokens: going on with" in caplog.text

    policy.room -= 1
    place = documents.location(int(documents.lengths.argmax()))
    with pytest.raises(RunError, match=f"{place}: out of memory in one document of {longest} tokens"):
        score_documents(policy, documents, CPU, tokens_per_pass=longest)


def test_labelled_answers_where_memory_ends(
    tmp_path: Path, toy_tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    rows = tmp_path / "rows.jsonl"
    some = [{"prompt": f"Say {'9 ' * n}", "completion": "word " * (1 + n % 5), "label": n % 2 == 0} for n in range(9)]
    rows.write_text("".join(json.dumps(row) + "\n" for row in some))
    config = Config.from_flat(
        {
            "base_model": "toy",
            "datasets": [{"path": str(rows)}],
            "rl": "kto",
            "dataset_prepared_path": str(tmp_path / "cache"),
        }
    )
    answers = held_out(config, toy_tokenizer).documents
    policy = Small(toy_model("gpt2", vocab_size=512), flat=False)
    expected = score_labelled(policy, answers, CPU, tokens_per_pass=10_000, sequence_len=512)
    # The second prompt with the first answer, by hand.
    first, second = answers[0], answers[1]
    ids = torch.from_numpy(np.concatenate([second.input_ids[: second.prompt], first.input_ids[first.prompt :]]))
    with torch.no_grad():
        logps = policy.model(input_ids=ids.long()[None]).logits[0].log_softmax(-1)
    behind = range(second.prompt, len(ids))
    by_hand = sum(float(logps[n - 1, ids[n]]) for n in behind)
    assert expected.mismatched[1] == pytest.approx(by_hand, abs=1e-4)

    policy.flat = True  # the cut's affair alone: each document still runs by itself
    policy.hidden = lambda *given, **rows: Policy(policy.model, flat=False).hidden(*given, **rows)  # type: ignore[method-assign]
    policy.room = int(answers.lengths.max()) + 10
    with caplog.at_level(logging.WARNING, "luthier"):
        found = score_labelled(policy, answers, CPU, tokens_per_pass=10_000, sequence_len=512)
    assert caplog.text.count("out of memory with passes of up to") >= 2  # of the answers, and of those to other prompts
    for name in ("logps", "tokens", "mismatched"):
        assert getattr(found, name) == pytest.approx(getattr(expected, name), abs=1e-4)
    policy.room = 3
    with pytest.raises(RunError, match="out of memory in one document"):
        score_labelled(policy, answers, CPU, tokens_per_pass=10_000, sequence_len=512)


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation gives."""

    found = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for each in result if isinstance(result, tuple | list) else [result]:
            if isinstance(each, torch.Tensor):
                self.found = max(self.found, each.numel())
        return result


def test_a_large_vocabulary_is_never_held_as_logits_of_a_pass(tmp_path: Path, toy_tokenizer: Any) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": "word " * 200}) + "\n" for _ in range(20)))
    entry = {"path": str(rows), "type": "completion"}
    cache = str(tmp_path / "cache")
    config = Config.from_flat({"base_model": "toy", "datasets": [entry], "dataset_prepared_path": cache})
    texts = held_out(config, toy_tokenizer).documents
    vocabulary, labels = 20_000, int(texts.trained.sum())
    model = toy_model("llama", vocab_size=vocabulary)
    use_flat_attention(model)
    policy = build_policy(model, None, 4096)
    largest = Largest()
    with largest:  # all of the documents in one pass
        score_documents(policy, texts, CPU, tokens_per_pass=100_000)
    assert labels > 2000 and largest.found < labels * vocabulary / 4


def test_what_is_no_number_is_said_and_is_no_figure(documents: Any, caplog: pytest.LogCaptureFixture) -> None:
    model = toy_model("gpt2", vocab_size=512)
    with torch.no_grad():
        model.get_output_embeddings().weight.fill_(float("inf"))
    with caplog.at_level(logging.WARNING, "luthier"):
        scores = score_documents(Policy(model, flat=False), documents, CPU, tokens_per_pass=100)
    assert f"in {len(documents)} of {len(documents)} documents" in caplog.text
    figures = all_figures(RowFigures(scores.tokens, {"loss": (scores.nll, scores.tokens)}), None, {})["all"]["target"]
    assert figures["loss"] == figures["perplexity"] == {"value": None, "low": None, "high": None}


def test_another_error_is_not_taken_for_one(documents: Any) -> None:
    policy = Small(toy_model("gpt2", vocab_size=512), flat=False)
    policy.room, policy.words = 0, RuntimeError("shapes do not match")
    with pytest.raises(RuntimeError, match="shapes"):
        score_documents(policy, documents, CPU, tokens_per_pass=100)
