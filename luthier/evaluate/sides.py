"""One of the models that are compared, and what is known of each row under it: figures, and a line of the result.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

from luthier.config import Config
from luthier.data.held_out import HeldOut
from luthier.data.tokenizer import terminator_ids
from luthier.evaluate.answers import Answer, Question, question_of
from luthier.evaluate.exact_match import is_exact
from luthier.evaluate.figures import RowFigures
from luthier.evaluate.labelled import (
    Labelled,
    LabelledScores,
    labelled,
    labelled_figures,
    labelled_line,
    labelled_texts,
)
from luthier.evaluate.measure import DocumentScores
from luthier.evaluate.pairs import PairScores, pair_figures, pair_line, pair_texts
from luthier.generate.text import decode


@dataclass
class Side:
    """One of the models that are compared, and what it makes of the rows.

    Attributes:
        name: what to call it. path: where it is; for the base of a run, whose config says how to load it, None.
        documents: (D,) their indices in `data.documents`; rows: (D,) the row of each, by number.
        questions, answers: by the number of the row, of those that are asked.
    """

    name: str
    path: str | None
    run: Config | None
    tokenizer: PreTrainedTokenizerBase
    config: Config
    data: HeldOut
    documents: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    questions: dict[int, Question] = field(default_factory=dict)
    scores: DocumentScores | PairScores | LabelledScores | None = None
    answers: dict[int, Answer] = field(default_factory=dict)
    described: dict[str, Any] = field(default_factory=dict)

    @property
    def rows(self) -> npt.NDArray[np.int64]:
        return self.data.documents.rows[self.documents]

@dataclass(frozen=True)
class Found:
    """What is known of the rows under a model; of answers with labels each for itself as well."""

    figures: RowFigures
    answers: Labelled | None = None


def of_rows(sides: Sequence[Side], rows: npt.NDArray[np.int64], seed: int = 0) -> list[Found]:
    """Of each side, row by row. Rewards are against the base, if it is among them; `seed` is that of intervals."""
    section = sides[0].config.preference
    base = next((side.scores for side in sides if side.path is None), None)
    found = []
    for side in sides:
        reference = None if side.path is None else base
        if isinstance(side.scores, DocumentScores):
            found.append(Found(_by_row(side, side.scores, rows)))
            continue
        assert section.rl is not None and section.rl_beta is not None
        if isinstance(side.scores, PairScores):
            assert reference is None or isinstance(reference, PairScores)
            found.append(Found(pair_figures(side.scores, reference, section.rl, section.rl_beta)))
        else:
            assert side.scores is not None and (reference is None or isinstance(reference, LabelledScores))
            labels = side.data.documents.desirable[side.documents]
            answers = labelled(side.scores, reference, labels, section.rl_beta, seed)
            owner = np.searchsorted(rows, side.rows)
            found.append(Found(labelled_figures(answers, owner, len(rows)), answers))
    return found


def _by_row(side: Side, scores: DocumentScores, rows: npt.NDArray[np.int64]) -> RowFigures:
    """Sums of the documents of each row; a row of raw text may be several."""
    owner = np.searchsorted(rows, side.rows)

    def add_up(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        return np.bincount(owner, values, minlength=len(rows)).astype(np.float64)

    exact, stopped = np.full(len(rows), np.nan), np.full(len(rows), np.nan)
    for row, answer in side.answers.items():
        place = int(np.searchsorted(rows, row))
        exact[place] = is_exact(answer.shown, side.questions[row].expected)
        stopped[place] = answer.stopped
    tokens = add_up(scores.tokens)
    columns: dict[str, tuple[npt.NDArray[np.float64], npt.NDArray[np.float64] | None]] = {
        "loss": (add_up(scores.nll), tokens),
        "token_accuracy": (add_up(scores.correct), tokens),
        "exact_match": (exact, None),
        "stopped": (stopped, None),
    }
    return RowFigures(tokens, columns)


def row_lines(
    sides: Sequence[Side],
    rows: npt.NDArray[np.int64],
    columns: dict[int, dict[str, str]],
    found: Sequence[Found],
) -> Iterator[dict[str, Any]]:
    """A line for each row of the target, or for each of its answers with a label, with what each model made of it."""
    target = sides[0]
    data = target.data
    names = data.datasets_of(rows)
    ends = set(terminator_ids(target.tokenizer, target.config))
    places = [_places(side) for side in sides]
    for number, row in enumerate(rows.tolist()):
        answers = len(places[0][row]) if found[0].answers else 1
        for nth in range(answers):
            index = int(target.documents[places[0][row][nth]])
            line: dict[str, Any] = {
                "dataset": names[number],
                "location": data.documents.location(index),
                **({"by": columns[row]} if columns else {}),
                **_texts(target, index, ends),
            }
            for role, side, own, place in zip(("target", "compare"), sides, found, places, strict=False):
                if own.answers is not None:
                    line[role] = labelled_line(own.answers, place[row][nth]) if nth < len(place[row]) else None
                elif isinstance(side.scores, PairScores):
                    line[role] = pair_line(side.scores, number)
                else:
                    line[role] = _model_line(side, own.figures, number, row)
            yield line


def _places(side: Side) -> dict[int, list[int]]:
    """Row -> where its documents are among the side's."""
    found: dict[int, list[int]] = {}
    for place, row in enumerate(side.rows.tolist()):
        found.setdefault(row, []).append(place)
    return found


def _texts(target: Side, index: int, ends: set[int]) -> dict[str, Any]:
    """What was asked and expected, for people."""
    documents = target.data.documents
    if isinstance(target.scores, PairScores):
        return pair_texts(documents, index, target.tokenizer)
    if isinstance(target.scores, LabelledScores):
        return labelled_texts(documents, index, target.tokenizer)
    question = question_of(documents, index, target.tokenizer, ends)
    if question is None:
        return {"prompt": "", "expected": decode(target.tokenizer, documents[index].input_ids.tolist())}
    return {"prompt": decode(target.tokenizer, question.prompt_ids), "expected": question.expected}


def _model_line(side: Side, found: RowFigures, number: int, row: int) -> dict[str, Any]:
    nll, correct, exact = (found.columns[name][0][number] for name in ("loss", "token_accuracy", "exact_match"))
    line: dict[str, Any] = {
        "loss": nll / found.tokens[number],
        "tokens": int(found.tokens[number]),
        "correct_tokens": int(correct),
        "answer": None,
    }
    if (answer := side.answers.get(row)) is not None:
        line |= {"answer": answer.text, "stopped": answer.stopped, "exact": bool(exact)}
        line |= {"skipped": answer.skipped} if answer.skipped else {}
    return line
