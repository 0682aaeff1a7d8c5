"""Repeats in the data of a run: training documents that are there already, and those that are in the validation
data too.

Repeats are found behind the split and behind the cache, on tokens, so that other settings tokenise nothing again.
Validation documents always stay: what a run is measured on does not depend on what it is trained on. Of equal
training documents the first one stays.

Equal documents have the same tokens and labels. Near ones are alike as a whole and in what is trained of them, each
to the threshold (`near`): two questions about the same long text are two documents. What is compared begins behind the
template: a beginning of a prompt that a tenth of the documents have is none of their own.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from luthier.data.near import find_near, hash_runs, jaccard, runs_of, shingles
from luthier.data.report import Repeats, Tally

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from luthier.data.dataset import Document, TokenDataset

Ints = npt.NDArray[np.int64]
IGNORED = -100
GRAM = 13
"""Words in a row that make an example suspicious (Brown et al. 2020, "Language Models are Few-Shot Learners",
appendix C)."""

_SAMPLE = 2048  # documents that say what the template is
_TEMPLATE_SHARE, _TEMPLATE_LEAST = 0.1, 8
_LOOKED_THROUGH = 10_000_000  # training tokens in which a run looks for validation text
_COMMON_SHARE, _COMMON_LEAST = 0.05, 2


def find_repeats(
    train: TokenDataset,
    validation: TokenDataset | None,
    source_of: Callable[[TokenDataset, int], str],
    *,
    exact: bool,
    threshold: float | None,
    whole_prompts: bool = False,
) -> tuple[TokenDataset, Repeats]:
    """What is left of the training data, and what was found: repeats are left out with `exact` (equal ones) or a
    `threshold` (equal and near ones), else only counted.

    Args:
        source_of: name of the dataset that a document is from.
        whole_prompts: prompts are trained too, so that labels do not say where a template may end.
    """
    repeats = Repeats(removed=exact or threshold is not None, threshold=threshold)
    between: Counter[tuple[str, str]] = Counter()
    gone = np.zeros(len(train), dtype=bool)

    def leave_out(tally: Tally, index: int, other: TokenDataset, twin: int) -> None:
        gone[index] = True
        tally.add(train.location(index), f"as {other.location(twin)}")
        name = "the validation data" if other is not train else source_of(train, twin)
        between[source_of(train, index), name] += 1

    if validation is not None:
        first_of = _first_of(validation.digests)
        for index in np.flatnonzero(np.isin(train.digests, validation.digests)).tolist():
            leave_out(repeats.contaminating, index, validation, first_of[int(train.digests[index])])
        repeats.in_validation = len(validation) - len(first_of)
    for index, twin in _equal(train, ~gone):
        leave_out(repeats.exact, index, train, twin)
    if threshold is not None:
        left = np.flatnonzero(~gone)
        documents = _Documents(train.subset(left), validation, Templates(train, whole_prompts))
        near = find_near(len(documents), documents.values, documents.alike(threshold), threshold, documents.held)
        repeats.unsure = near.unsure
        for index, twin in near.twins.items():
            held = twin < documents.held
            other = (validation or train, twin) if held else (train, int(left[twin - documents.held]))
            tally = repeats.near_contaminating if held else repeats.near
            leave_out(tally, int(left[index - documents.held]), *other)
    repeats.between = [(one, other, count) for (one, other), count in sorted(between.items())]
    return (train.subset(np.flatnonzero(~gone)) if repeats.removed and gone.any() else train), repeats


def _first_of(digests: npt.NDArray[np.uint64]) -> dict[int, int]:
    values, places = np.unique(digests, return_index=True)
    return dict(zip(values.tolist(), places.tolist(), strict=True))


def _equal(train: TokenDataset, among: npt.NDArray[np.bool_]) -> Iterable[tuple[int, int]]:
    """Each document that is the same as one before it, and that one; only those with equal digests are looked at."""
    _, inverse, counts = np.unique(train.digests, return_inverse=True, return_counts=True)
    seen: dict[tuple[int, bytes], int] = {}
    for index in np.flatnonzero((counts[inverse] > 1) & among).tolist():
        document = train[index]
        # Of ready-made tokens and of messages with flags, the same tokens may be trained elsewhere.
        content = hashlib.blake2b(document.input_ids.tobytes() + document.labels.tobytes(), digest_size=16)
        key = int(train.digests[index]), content.digest()
        if (first := seen.setdefault(key, index)) != index:
            yield index, first


class _Documents:
    """Validation documents and then training ones, as `find_near` asks for them."""

    def __init__(self, train: TokenDataset, validation: TokenDataset | None, templates: Templates) -> None:
        self._train = train
        self._validation = validation
        self._templates = templates
        self.held = 0 if validation is None else len(validation)

    def __len__(self) -> int:
        return self.held + len(self._train)

    def _document(self, number: int) -> Document:
        if number < self.held and self._validation is not None:
            return self._validation[number]
        return self._train[number - self.held]

    def values(self, number: int) -> npt.NDArray[np.uint64]:
        """Its tokens; all of them where nothing is behind the template."""
        document = self._document(number)
        own = self._templates.own(document)
        return (own if len(own) else document.input_ids).astype(np.uint64)

    def alike(self, threshold: float) -> Callable[[int, int], bool]:
        """Whether two documents are near: as a whole, and each answer."""

        @lru_cache(maxsize=4096)
        def sets(number: int) -> tuple[bool, list[npt.NDArray[np.uint64]]]:
            document = self._document(number)
            parts = [self.values(number), *_answers(document)]
            return document.desirable, [shingles(part) for part in parts]

        def near(one: int, other: int) -> bool:
            (label, parts), (other_label, others) = sets(one), sets(other)
            if label != other_label or len(parts) != len(others):
                return False
            return all(
                jaccard(part, twin, threshold) >= threshold for part, twin in zip(parts, others, strict=True)
            )

        return near


class Templates:
    """What a tenth of the training documents begin with before anything in them is trained."""

    def __init__(self, train: TokenDataset, whole_prompts: bool) -> None:
        self._whole_prompts = whole_prompts
        count = min(_SAMPLE, len(train))
        chosen = np.sort(np.random.default_rng(0).permutation(len(train))[:count])
        documents = (train[index] for index in chosen.tolist())
        beginnings = [document.input_ids[: self._bound(document)] for document in documents]
        least = max(_TEMPLATE_LEAST, math.ceil(_TEMPLATE_SHARE * count))
        self._found = [(found, found.tobytes()) for found in common_beginnings(beginnings, least)]

    def own(self, document: Document) -> npt.NDArray[np.int32]:
        """The document's tokens behind the template; a pair's prompt once."""
        ids = document.input_ids
        start = self._end(document)
        if document.pair and document.lengths:
            first = document.lengths[0]
            return np.concatenate([ids[start:first], ids[first + document.prompt :]])
        return ids[start:]

    def _end(self, document: Document) -> int:
        ids = document.input_ids[: self._bound(document)]
        longest = 0
        for template, as_bytes in self._found:
            if ids[: len(template)].tobytes() == as_bytes:
                longest = max(longest, len(template))
            elif len(template) > longest:
                common = min(len(ids), len(template))
                differ = np.flatnonzero(ids[:common] != template[:common])
                longest = max(longest, int(differ[0]) if len(differ) else common)
        return longest

    def _bound(self, document: Document) -> int:
        """Where a template ends at the latest."""
        if document.prompt:
            return document.prompt
        if self._whole_prompts:
            return len(document.input_ids)
        if document.lengths:
            return 0  # packed elsewhere
        return int(np.argmax(document.labels != IGNORED))


def _answers(document: Document) -> list[Ints]:
    """What is compared of a document on its own: each answer of a pair, else what is trained."""
    ids = document.input_ids.astype(np.int64)
    if document.pair and document.lengths:
        first = document.lengths[0]
        return [ids[document.prompt : first], ids[first + document.prompt :]]
    return [ids[document.labels != IGNORED]]


def common_beginnings(beginnings: Sequence[npt.NDArray[Any]], least: int) -> list[npt.NDArray[Any]]:
    """The longest beginnings that at least so many of these have."""
    found: list[npt.NDArray[Any]] = []
    groups = [(0, list(range(len(beginnings))))]
    while groups:
        depth, group = groups.pop()
        following: dict[int, list[int]] = {}
        for index in group:
            if len(beginnings[index]) > depth:
                following.setdefault(int(beginnings[index][depth]), []).append(index)
        longer = [members for members in following.values() if len(members) >= least]
        if not longer and depth:
            found.append(beginnings[group[0]][:depth])
        groups += [(depth + 1, members) for members in longer]
    return found


# --- shared text --------------------------------------------------------------------------------------------


def shared_text(
    train: TokenDataset, validation: TokenDataset, tokenizer: PreTrainedTokenizerBase, whole_prompts: bool = False
) -> tuple[int, int, float]:
    """How many validation documents have about 13 words in a row that training documents have too, how many tokens
    that is, and the share of the training tokens that was looked through.

    Equality is too strict a measure: an example may stand inside of another one, or with another question. Runs that
    many validation documents have are phrases of the format, and say nothing.
    """
    length = _tokens_of_words(validation, tokenizer, GRAM)
    templates = Templates(train, whole_prompts)
    texts = SharedRuns(length)
    for index in _within(validation, _LOOKED_THROUGH // 4):
        texts.add(templates.own(validation[index]))
    looked = 0
    for index in _within(train, _LOOKED_THROUGH):
        looked += int(train.lengths[index])
        texts.look(templates.own(train[index]))
    return len(texts.found()), length, looked / max(1, int(train.lengths.sum()))


class SharedRuns:
    """Which of some documents share a run of so many values with others that are looked through."""

    def __init__(self, length: int) -> None:
        self._length = length
        self._runs: list[npt.NDArray[np.uint64]] = []
        self._sorted: npt.NDArray[np.uint64] | None = None
        self._hit = np.zeros(0, dtype=bool)
        self._waiting: list[npt.NDArray[Any]] = []
        self._size = 0

    def add(self, values: npt.NDArray[Any]) -> None:
        """A document that may share something."""
        self._runs.append(np.unique(hash_runs(values, self._length)))

    def look(self, values: npt.NDArray[Any]) -> None:
        """A document that may have it."""
        self._waiting.append(values)
        self._size += len(values)
        if self._size > 1 << 19:
            self._compare()

    def found(self) -> list[int]:
        """Numbers of the documents that share a run."""
        self._compare()
        hits = self._known()[self._hit]
        return [number for number, runs in enumerate(self._runs) if np.isin(runs, hits).any()]

    @property
    def short(self) -> int:
        """Documents that are too short for a run."""
        return sum(not len(runs) for runs in self._runs)

    def _known(self) -> npt.NDArray[np.uint64]:
        if self._sorted is None:
            runs, counts = np.unique(np.concatenate([np.zeros(0, np.uint64), *self._runs]), return_counts=True)
            self._sorted = runs[counts <= max(_COMMON_LEAST, _COMMON_SHARE * len(self._runs))]
            self._hit = np.zeros(len(self._sorted), dtype=bool)
        return self._sorted

    def _compare(self) -> None:
        known = self._known()
        if self._waiting and len(known):
            values, _ = runs_of(self._waiting, self._length)
            places = np.minimum(np.searchsorted(known, values), len(known) - 1)
            self._hit[places[known[places] == values]] = True
        self._waiting, self._size = [], 0


def _within(dataset: TokenDataset, tokens: int) -> list[int]:
    """As many documents, drawn at random, as have so many tokens together; in order."""
    order = np.random.default_rng(0).permutation(len(dataset))
    kept = order[np.cumsum(dataset.lengths[order]) <= tokens]
    return np.sort(kept).tolist()


def _tokens_of_words(dataset: TokenDataset, tokenizer: PreTrainedTokenizerBase, words: int) -> int:
    """Tokens that so many words of this data have."""
    tokens = counted = 0
    for index in range(min(len(dataset), 64)):
        ids = dataset[index].input_ids
        tokens += len(ids)
        counted += len(str(tokenizer.decode(ids.tolist())).split())
    return max(words, round(words * tokens / max(1, counted)))
