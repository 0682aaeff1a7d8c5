"""Bin packing: every item once, no bin over its capacity, few bins."""

from __future__ import annotations

import numpy as np
import pytest

from luthier.data.packing import best_fit, cut_into_passes


@pytest.mark.parametrize("seed", range(5))
def test_every_document_once_and_no_bin_too_full(seed: int) -> None:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 120, size=300)
    bins = best_fit(lengths, 100)
    assert sorted(i for bin_ in bins for i in bin_) == list(range(300))
    for bin_ in bins:
        assert lengths[bin_].sum() <= 100 or len(bin_) == 1
    fits = lengths[lengths <= 100]
    assert len(bins) - (lengths > 100).sum() <= np.ceil(fits.sum() / 100) * 11 / 9 + 1


def test_short_documents_fill_their_rows() -> None:
    lengths = np.random.default_rng(0).lognormal(4.5, 0.6, size=5000).astype(int).clip(10, 2048)
    bins = best_fit(lengths, 2048)
    assert lengths.sum() / (len(bins) * 2048) > 0.97


def test_passes() -> None:
    assert cut_into_passes([5, 5, 5], 15) == [[0, 1, 2]]
    assert sorted(map(tuple, cut_into_passes([50, 5, 5], 15))) == [(0,), (1, 2)]
    assert cut_into_passes([5, 5], 15, alone=True) == [[0], [1]]
