"""Forests of documents: every token is there, once for all who share it, and labels keep their weight."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from luthier.data.dataset import Document
from luthier.data.loader import make_batch
from luthier.data.tree import MIN_SHARED, Forest, cut_by_beginning, shared_forest

CPU = torch.device("cpu")


def _documents(rng: np.random.Generator) -> list[np.ndarray]:
    """Of two letters, so that they share beginnings of all lengths; some begin others, some are equal."""
    base = rng.integers(0, 2, 80)
    documents: list[np.ndarray] = []
    for _ in range(int(rng.integers(1, 9))):
        document = base[: rng.integers(1, 60)]
        if rng.random() < 0.6:
            document = np.concatenate([document, rng.integers(0, 2, rng.integers(0, 30))])
        if documents and rng.random() < 0.3:
            document = documents[rng.integers(len(documents))][: rng.integers(1, 99)]
        documents.append(document)
    return documents


def _check(documents: list[np.ndarray], forest: Forest) -> None:
    segments = list(zip(forest.owners, forest.starts, forest.lengths, strict=True))
    flat = np.concatenate([documents[o][a : a + n] for o, a, n in segments])
    positions = np.concatenate([np.arange(a, a + n) for _, a, n in segments])
    segment_of = np.repeat(np.arange(len(segments)), forest.lengths)
    assert all(parent < index for index, parent in enumerate(forest.parents))
    assert all(n > 0 for n in forest.lengths)
    for document, places in zip(documents, forest.places, strict=True):
        np.testing.assert_array_equal(flat[places], document)
        np.testing.assert_array_equal(positions[places], np.arange(len(document)))
        # What its last token sees by the parents is the document and nothing else.
        segment, seen = int(segment_of[places[-1]]), set()
        while segment >= 0:
            seen.add(segment)
            segment = forest.parents[segment]
        assert seen == set(segment_of[places].tolist())


def test_random_documents_are_whole_and_see_themselves_only() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        documents = _documents(rng)
        _check(documents, shared_forest(documents))


def test_what_several_begin_with_is_there_once() -> None:
    first, second = np.arange(20), np.arange(100, 112)
    documents = [
        np.concatenate([first, second, [1, 2]]),
        np.concatenate([first, [5]]),
        np.concatenate([first, second, [3]]),
        np.arange(50, 60),
    ]
    forest = shared_forest(documents)
    _check(documents, forest)
    assert sum(forest.lengths) == 20 + 12 + 2 + 1 + 1 + 10
    assert sorted(forest.lengths) == sorted([20, 12, 2, 1, 1, 10])


def test_equal_documents_and_beginnings_of_others_need_no_segment() -> None:
    documents = [np.arange(20), np.arange(30), np.arange(30), np.arange(20)]
    forest = shared_forest(documents)
    _check(documents, forest)
    assert (forest.lengths, forest.parents) == ((20, 10), (-1, 0))


@pytest.mark.parametrize("shared", [MIN_SHARED - 1, MIN_SHARED])
def test_a_short_beginning_is_not_worth_it(shared: int) -> None:
    documents = [np.append(np.arange(shared), [90]), np.append(np.arange(shared), [91])]
    forest = shared_forest(documents)
    _check(documents, forest)
    assert sum(forest.lengths) == (2 * shared + 2 if shared < MIN_SHARED else shared + 2)


def test_passes_hold_a_budget_of_computed_tokens() -> None:
    one, other = np.arange(50), np.arange(100, 150)
    documents = [np.concatenate([prefix, [200 + n] * 10]) for n in range(4) for prefix in (one, other)]
    passes = cut_by_beginning(documents, 90)
    assert sorted(passes) == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert all(sum(shared_forest([documents[i] for i in p]).lengths) <= 90 for p in passes)
    assert cut_by_beginning([np.arange(50)], 10) == [[0]]


def _dataset(*rows: tuple[list[int], list[int], tuple[int, ...] | None]) -> list[Document]:
    return [
        Document(np.array(ids, np.int32), np.array(labels, np.int32), inside) for ids, labels, inside in rows
    ]


def _pairs(batch: object) -> dict[tuple[int, ...], float]:
    """(tokens up to a position, target) -> weight: what is trained, in a form that no layout shows in."""
    segments = np.repeat(np.arange(len(batch.lengths)), batch.lengths)  # type: ignore[attr-defined]
    ids, starts = batch.input_ids.tolist(), np.cumsum([0, *batch.lengths])  # type: ignore[attr-defined]
    found: dict[tuple[int, ...], float] = {}
    for place, target, weight in zip(
        batch.position_N.tolist(),  # type: ignore[attr-defined]
        batch.target_N.tolist(),  # type: ignore[attr-defined]
        batch.weight_N.tolist(),  # type: ignore[attr-defined]
        strict=True,
    ):
        segment = int(segments[place])
        context = ids[starts[segment] : place + 1]
        while (segment := batch.parents[segment]) >= 0:  # type: ignore[attr-defined]
            context = ids[starts[segment] : starts[segment + 1]] + context
        assert len(context) == batch.position_ids[place] + 1  # type: ignore[attr-defined]
        key = (*context, -1, target)
        found[key] = found.get(key, 0) + weight
    return found


def test_labels_of_a_shared_token_are_one_label_with_their_weights_added() -> None:
    prefix = list(range(10))
    dataset = _dataset(
        ([*prefix, 20, 21], [*prefix, 20, 21], None),
        ([*prefix, 22], [-100] * 10 + [22], None),
        ([*prefix, 20, 21], [-100] * 11 + [21], None),
        # A row that was packed before: its documents take part one by one.
        ([*prefix, 23, 40, 41], [*prefix, 23, 40, 41], (11, 2)),
    )
    rows, seeds = [0, 1, 2, 3], [1, 2, 3, 4]
    plain = make_batch(dataset, rows, seeds, CPU)  # type: ignore[arg-type]
    shared = make_batch(dataset, rows, seeds, CPU, share=True)  # type: ignore[arg-type]
    assert plain.parents == (-1,) * 5 and len(plain.input_ids) == 12 + 11 + 12 + 13
    assert len(shared.input_ids) == 10 + 2 + 1 + 1 + 2
    assert _pairs(plain) == _pairs(shared)
    assert shared.weight_N.max() == 2 and shared.weight_N.sum() == len(plain.weight_N)
    # The last token that all share leads to three different ones.
    counts = torch.bincount(shared.position_N)
    assert counts.max() == 3
