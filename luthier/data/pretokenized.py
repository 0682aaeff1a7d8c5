"""Rows that are tokens already: alignment of their labels, padding, and the documents inside of packed rows.

Labels are aligned as in transformers: `labels[t]` is `input_ids[t]` where the token is trained and -100 where
it is not, and the trainer shifts. Some published packed files hold labels that are shifted already:
`labels[t]` is `input_ids[t + 1]`. Trained as they are, each token would be asked for the one after the next,
and nothing would look wrong but the loss. Since the two can be told apart, they are: neither is ever taken
for the other.
"""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from luthier.data.examples import TokenExample
from luthier.data.values import Row, fields_of, shortened, type_name
from luthier.errors import DataError

IGNORED = -100
_LENGTHS = ("segment_lengths", "seq_lengths")
_MASKS = ("completion_mask", "assistant_masks")
TOKEN_COLUMNS = frozenset({"input_ids", "labels", "attention_mask", "position_ids", *_LENGTHS, *_MASKS})

Ints = npt.NDArray[np.int64]


def token_example(row: Row, labels_shifted: bool, notes: Counter[str]) -> TokenExample:
    """The documents of a row. Raises DataError where its columns do not fit each other."""
    if row.get("input_ids") is None:
        raise DataError(
            f"there is no `input_ids`: an entry without `type` must have tokens already; {fields_of(row)}. "
            "Set `type` to say what the columns are"
        )
    ids = _ints(row, "input_ids")
    if not len(ids):
        raise DataError("`input_ids` is empty")
    if ids.min() < 0:
        raise DataError(f"`input_ids` holds {ids.min()}; token ids are 0 or more")
    labels = _labels(row, ids, notes)
    keep, lengths = _documents(row, len(ids))
    if not keep.all():
        if (labels[~keep] != IGNORED).any():
            at = int(np.flatnonzero(~keep & (labels != IGNORED))[0])
            raise DataError(f"`labels` trains position {at}, which `attention_mask` says is padding")
        notes["padding tokens, left out"] += int((~keep).sum())
        ids, labels = ids[keep], labels[keep]
    if labels_shifted:
        ids, labels, lengths = _shift_back(ids, labels, lengths, notes)
    else:
        _check_aligned(ids, labels, lengths)
    if len(lengths) > 1:
        notes["documents, taken out of packed rows"] += len(lengths)
    return TokenExample(ids.tolist(), labels.tolist(), tuple(lengths))


def _ints(row: Row, field: str, length: int | None = None) -> Ints:
    value: Any = row[field]
    if not isinstance(value, list):
        raise DataError(f"`{field}` must be a list of whole numbers, and is {type_name(value)}")
    if length is not None and len(value) != length:
        raise DataError(f"`{field}` has {len(value)} entries, and `input_ids` {length}")
    try:
        array = np.asarray(value if value else [], dtype=None if value else np.int64)
    except ValueError:  # lists inside of the list, of several lengths
        array = np.asarray([value[0]], dtype=object)
    if array.ndim != 1 or array.dtype.kind not in "iub":
        odd = next((item for item in value if type(item) is not int), value[0])
        raise DataError(
            f"`{field}` must hold whole numbers only, and holds {type_name(odd)}: {shortened(odd)}"
        )
    return array.astype(np.int64)


def _labels(row: Row, ids: Ints, notes: Counter[str]) -> Ints:
    if row.get("labels") is not None:
        return _ints(row, "labels", len(ids))
    mask = next((name for name in _MASKS if row.get(name) is not None), None)
    if mask is not None:
        return np.where(_ints(row, mask, len(ids)) != 0, ids, IGNORED)
    notes["rows without `labels`, of which every token is trained"] += 1
    return ids.copy()


def _documents(row: Row, count: int) -> tuple[npt.NDArray[np.bool_], list[int]]:
    """Which positions are tokens rather than padding, and the lengths of the documents they make up."""
    segment: Ints = np.ones(count, dtype=np.int64)
    if row.get("attention_mask") is not None:
        # 0 is padding; beyond 0 and 1, packers number the documents of a row here.
        segment = _ints(row, "attention_mask", count)
    keep = segment != 0
    if not keep.any():
        raise DataError("`attention_mask` is 0 everywhere: the row is all padding")
    starts = np.zeros(count, dtype=bool)
    starts[1:] = segment[1:] != segment[:-1]
    name = next((name for name in _LENGTHS if row.get(name) is not None), None)
    if name is not None:
        starts |= _starts_by_lengths(_ints(row, name), name, count, int(keep.sum()))
    if row.get("position_ids") is not None:
        positions = _ints(row, "position_ids", count)
        starts[1:] |= positions[1:] != positions[:-1] + 1
    kept = starts[keep]
    kept[0] = True
    bounds = np.append(np.flatnonzero(kept), len(kept))
    return keep, np.diff(bounds).tolist()


def _starts_by_lengths(lengths: Ints, name: str, count: int, tokens: int) -> npt.NDArray[np.bool_]:
    if (lengths < 1).any() or int(lengths.sum()) not in (count, tokens):
        raise DataError(
            f"`{name}` must be 1 or more each and sum to the row's {count} tokens; the sum is {lengths.sum()}"
        )
    starts = np.zeros(count, dtype=bool)
    at = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    starts[at] = True
    return starts


def _check_aligned(ids: Ints, labels: Ints, lengths: list[int]) -> None:
    trained = labels != IGNORED
    wrong = trained & (labels != ids)
    if not wrong.any():
        return
    if _is_shifted(ids, labels, lengths):
        raise DataError(
            "`labels` is already shifted by one against `input_ids` (each label is the next token). Write "
            "`labels_shifted: true` in this dataset's entry to have it shifted back"
        )
    at = int(np.flatnonzero(wrong)[0])
    raise DataError(
        f"`labels` has {labels[at]} at position {at}, where `input_ids` has {ids[at]}: a label is the token "
        f"at its own position, or {IGNORED}"
    )


def _is_shifted(ids: Ints, labels: Ints, lengths: list[int]) -> bool:
    """Whether every trained label is the next token; the last of a document has none to be compared with."""
    inner = np.ones(len(ids), dtype=bool)
    inner[np.cumsum(lengths) - 1] = False
    trained = np.flatnonzero((labels != IGNORED) & inner)
    return bool((labels[trained] == ids[trained + 1]).all())


def _shift_back(
    ids: Ints, labels: Ints, lengths: list[int], notes: Counter[str]
) -> tuple[Ints, Ints, list[int]]:
    """Labels of position t go to position t + 1.

    The last label of a document is a token that `input_ids` no longer has (often the EOS), so it is put back
    at the end. In a row that was shifted after packing it is the first token of the next document instead: no
    context of its own leads to it, and it is dropped and counted.
    """
    if (labels != IGNORED).any() and not _is_shifted(ids, labels, lengths):
        raise DataError("`labels_shifted: true`, but `labels` is not `input_ids` shifted by one")
    all_ids, all_labels, new_lengths = [], [], []
    bounds = np.concatenate([[0], np.cumsum(lengths)])
    for number, (start, stop) in enumerate(pairwise(bounds)):
        last = int(labels[stop - 1])
        following = int(ids[stop]) if number + 1 < len(lengths) else None
        document = [ids[start:stop]]
        shifted = [np.asarray([IGNORED]), labels[start : stop - 1]]
        if last != IGNORED and last != following:
            document.append(np.asarray([last]))
            shifted.append(np.asarray([last]))
        elif last != IGNORED:
            notes["labels that lead from one packed document into the next, left out"] += 1
        all_ids += document
        all_labels += shifted
        new_lengths.append(sum(map(len, document)))
    return np.concatenate(all_ids), np.concatenate(all_labels), new_lengths
