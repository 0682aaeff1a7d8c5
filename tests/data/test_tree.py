"""Forests of documents: every token is there, once for all who share it, and labels keep their weight."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from luthier.data.batches import make_batch
from luthier.data.dataset import Document
from luthier.data.loader import StepLoader
from luthier.data.packing import cut_into_passes
from luthier.data.tree import MIN_SHARED, Forest, Sharing, cut_by_beginning, shared_forest

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


def test_documents_of_a_group_share_as_much_as_they_may_and_others_nothing() -> None:
    rng = np.random.default_rng(1)
    some = 0
    for _ in range(300):
        documents = _documents(rng)
        limits = rng.integers(0, 40, 3)
        members = rng.integers(0, 3, len(documents))
        forest = shared_forest(documents, [(int(g), int(limits[g])) for g in members])
        _check(documents, forest)
        for one, places in enumerate(forest.places):
            for other in range(one):
                shared = len(np.intersect1d(places, forest.places[other]))
                if members[one] != members[other]:
                    assert not shared
                    continue
                n = min(len(places), len(documents[other]), limits[members[one]])
                alike = documents[one][:n] == documents[other][:n]
                common = n if alike.all() else int(alike.argmin())
                assert shared == (common if common >= MIN_SHARED else 0)
                some += shared > 0
    assert some > 100


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
    shared = make_batch(dataset, rows, seeds, CPU, share="all")  # type: ignore[arg-type]
    assert plain.parents == (-1,) * 5 and len(plain.input_ids) == 12 + 11 + 12 + 13
    assert len(shared.input_ids) == 10 + 2 + 1 + 1 + 2
    assert _pairs(plain) == _pairs(shared)
    assert shared.weight_N.max() == 2 and shared.weight_N.sum() == len(plain.weight_N)
    # The last token that all share leads to three different ones.
    counts = torch.bincount(shared.position_N)
    assert counts.max() == 3


def _pair(prompt: list[int], *answers: list[int]) -> Document:
    sides = [[*prompt, *answer] for answer in answers]
    ids = np.array([token for side in sides for token in side], np.int32)
    return Document(ids, ids, tuple(map(len, sides)), prompt=len(prompt), pair=True)


@pytest.mark.parametrize("share", ["", "rows", "all"])
def test_stretches_of_dropout_are_the_prompt_and_what_is_behind_it(share: Sharing) -> None:
    prompt, short = list(range(10)), list(range(50, 53))
    dataset = [
        _pair(prompt, [20, 21, 22], [20, 21, 25, 26]),
        _pair(short, [30] * 9 + [31], [30] * 9 + [32]),
        *_dataset(([*prompt, 40], [*prompt, 40], None), ([60, 61, 62], [60, 61, 62], (1, 2))),
    ]
    batch = make_batch(dataset, [0, 1, 2, 3], [5, 6, 7, 8], CPU, share=share)  # type: ignore[arg-type]
    assert sum(batch.drawn) == len(batch.input_ids) == sum(batch.lengths)
    stretches = list(zip(batch.drawn, batch.seeds, strict=True))
    first, second = 1 << 40, 2 << 40
    answers = [(10, 5), (3, 5 + first)], [(4, 5 + second)]
    behind = [(3, 6), (10, 6 + first), (3, 6), (10, 6 + second), (11, 7), (1, 8), (2, 8 + first)]
    if share == "":
        assert stretches == [*answers[0], (10, 5), *answers[1], *behind]
    if share == "rows":  # the short prompt is not worth it
        assert stretches == [*answers[0], *answers[1], *behind]
        assert batch.parents[:3] == (-1, 0, 0) and set(batch.parents[3:]) == {-1}
    if share == "all":  # of a document, of the answers, of both answers' beginning
        assert len(batch.input_ids) == 12 + 1 + 2 + 1 + 12 + 1 + 1 + 3


class Rows:
    """As much of a `TokenDataset` as the loader asks for."""

    def __init__(self, documents: list[Document]) -> None:
        self.documents = documents
        self.lengths = np.array([len(document.input_ids) for document in documents])
        self.trained = self.lengths
        self.prompts = np.array([document.prompt for document in documents])
        self.chosen = np.array([int(document.pair) for document in documents])

    def __len__(self) -> int:
        return len(self.documents)

    def __getitem__(self, index: int) -> Document:
        return self.documents[index]


def _loader(rows: Rows, budget: int, share: Sharing, processes: int = 1, rank: int = 0) -> StepLoader:
    return StepLoader(
        rows,  # type: ignore[arg-type]
        rows_per_step=len(rows),
        tokens_per_pass=budget,
        seed=0,
        shuffle=False,
        share=share,
        processes=processes,
        rank=rank,
    )


def test_pairs_fill_passes_by_what_is_computed_of_them() -> None:
    rng = np.random.default_rng(2)
    both: tuple[Sharing, ...] = ("rows", "all")
    fewer = 0
    for trial in range(60):
        prompts = [rng.integers(0, 9, rng.integers(2, 60)).tolist() for _ in range(4)]
        rows = Rows(
            [
                _pair(prompts[rng.integers(4)], *(rng.integers(0, 9, rng.integers(1, 25)).tolist() for _ in "ab"))
                for _ in range(12)
            ]
        )
        if trial % 3 == 0:  # single answers among them
            rows = Rows([*rows.documents, *_dataset((prompts[0], prompts[0], None), (prompts[1], prompts[1], None))])
        budget = int(rng.integers(60, 300))
        counts = {"": len(cut_into_passes(rows.lengths.tolist(), budget))}
        for share in both:
            loader = _loader(rows, budget, share)
            step = loader.step(0)
            assert sorted(i for indices in step.passes for i in indices) == list(range(len(rows)))
            assert step.tokens == rows.lengths.sum()
            batches = list(loader.batches(step, CPU))
            for indices, batch in zip(step.passes, batches, strict=True):
                assert len(batch.input_ids) <= budget or len(indices) == 1
            counts[share] = len(batches)
            computed = sum(len(batch.input_ids) for batch in batches)
            assert loader.saving() == pytest.approx(1 - computed / rows.lengths.sum())
        assert counts["all"] <= counts["rows"] <= counts[""]
        fewer += counts["all"] < counts["rows"] < counts[""]
    assert fewer > 5


def test_rows_with_one_prompt_come_into_one_pass() -> None:
    one, other = list(range(40)), list(range(50, 90))
    rows = Rows([_pair(prompt, [n, n + 1], [n + 2]) for n in range(100, 130, 10) for prompt in (one, other)])
    loader = _loader(rows, 50, "all")
    assert sorted(loader.step(0).passes) == [(0, 2, 4), (1, 3, 5)]
    assert all(len(batch.input_ids) == 40 + 3 * 3 for batch in loader.batches(loader.step(0), CPU))
    assert len(_loader(rows, 50, "rows").step(0).passes) == 6


def test_processes_share_pairs_by_what_is_computed_of_them() -> None:
    long, none = _pair(list(range(50)), [1], [2]), _pair([3], [4] * 25, [5] * 25)
    rows = Rows([long, none, none, long])
    computed = [
        sum(len(batch.input_ids) for batch in loader.batches(loader.step(0), CPU))
        for loader in (_loader(rows, 1000, "rows", 2, rank) for rank in range(2))
    ]
    assert computed == [52 + 52, 52 + 52]


def test_without_pairs_dropout_leaves_nothing_to_share() -> None:
    rows = Rows(_dataset((list(range(20)), list(range(20)), None), (list(range(30)), list(range(30)), (20, 10))))
    loader = _loader(rows, 1000, "rows")
    assert loader.share == "" and loader.saving() == 0
    assert len(next(iter(loader.batches(loader.step(0), CPU))).input_ids) == 50
