"""A model, or two, on rows of data: loss, token accuracy and short answers, with intervals, by dataset and by column.

What is measured on is settled first, with tokenizers alone; then one model is loaded at a time. Two models are
measured on the same rows, so that they can be compared row by row.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from luthier.config import Config
from luthier.config.preference import REFERENCE_FREE
from luthier.data import templates
from luthier.data.held_out import HeldOut, held_out
from luthier.data.tokenizer import is_chat, terminator_ids
from luthier.errors import ConfigError, DataError
from luthier.evaluate.answers import SHORT_ANSWER, SLACK, Answer, Question, greedy_answers, question_of
from luthier.evaluate.exact_match import is_exact
from luthier.evaluate.figures import RowFigures, all_figures
from luthier.evaluate.measure import DTYPES, DocumentScores, find_budget, free_unused, score_documents
from luthier.evaluate.pairs import PairScores, pair_figures, pair_line, pair_texts, score_pairs
from luthier.evaluate.progress import Progress
from luthier.evaluate.results import results_folder, write_results
from luthier.evaluate.what_data import Wanted, what_data
from luthier.generate.engine import default_terminators
from luthier.generate.text import decode
from luthier.models.assemble import open_base, open_for_inference, tokenizer_for_inference
from luthier.models.device import choose_device
from luthier.models.isolation import build_policy
from luthier.models.rope import check_length

log = logging.getLogger("luthier")

Dtype = Literal["auto", "fp32", "bf16", "fp16"]
BASE = "base"


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
    scores: DocumentScores | PairScores | None = None
    answers: dict[int, Answer] = field(default_factory=dict)
    described: dict[str, Any] = field(default_factory=dict)

    @property
    def rows(self) -> npt.NDArray[np.int64]:
        return self.data.documents.rows[self.documents]


def evaluate_data(
    target: str,
    *,
    data: Sequence[str] = (),
    type: str | None = None,
    compare: str | None = None,
    by: Sequence[str] = (),
    limit: int | None = None,
    short_answer: int = SHORT_ANSWER,
    tokens_per_pass: int | None = None,
    dtype: Dtype = "auto",
    device: str | None = None,
    output: Path | None = None,
    seed: int = 0,
) -> tuple[Path, dict[str, Any]]:
    """Measure a run, an adapter or a model, and write `NAME.json` and `NAME.jsonl`.

    Args:
        data: a config, or data files; none for what the run itself was validated on. type: of the rows in the files;
            None for that of the run. compare: another model, or `base` for the run's own. by: columns to group by.
        limit: so many rows, drawn by the seed. short_answer: most tokens of an answer that is asked for; 0 asks none.
        tokens_per_pass: None finds it. output: a folder in place of the run's.

    Returns:
        The JSON's path and content.

    Raises:
        ConfigError, DataError: before a model is loaded. ModelError, RunError.
    """
    # 1. What is measured on, by tokenizers alone.
    wanted = what_data(target, data, type)
    rl = wanted.config.preference.rl
    if rl not in (None, *REFERENCE_FREE) and wanted.run is not None and compare is None:
        log.info("rl: %s: rewards are against the base, which is measured too (--compare base)", rl)
        compare = BASE
    sides = _sides(target, compare, wanted)
    rows = _common_rows(sides, limit, seed)
    columns = sides[0].data.columns(by, rows.tolist()) if by else {}
    for side in sides:
        _choose(side, rows, short_answer)
    groups = _groups(sides[0].data, rows, by, columns)
    log.info("%s", _said(wanted, sides[0], rows))

    # 2. One model after the other.
    place = choose_device(device or (wanted.run.model.device_map if wanted.run else None))
    for number, side in enumerate(sides):
        if number:
            free_unused(place)
        _measure(side, place, DTYPES[dtype], tokens_per_pass)

    # 3. Figures, and the rows.
    of_rows = _figures(sides, rows)
    figures = all_figures(of_rows[0], of_rows[1] if compare else None, groups, seed)
    return write_results(
        results_folder(target, output),
        wanted.name,
        kind="data",
        target=target,
        compare=None if compare is None else (sides[1].path or sides[1].config.model.base_model),
        figures=figures,
        rows=_row_lines(sides, rows, columns),
        names={"target": sides[0].name, "compare": sides[1].name if compare else None},
        settings={
            "data": wanted.described,
            "rl": rl,
            "held_out_by": sides[0].data.what,
            "limit": limit,
            "seed": seed,
            "short_answer": short_answer,
            "models": {side.name: side.described for side in sides},
        },
    )


# --- what is measured on ------------------------------------------------------------------------------------


def _sides(target: str, compare: str | None, wanted: Wanted) -> list[Side]:
    """The target first; each with the rows as its own tokenizer cuts them."""
    tokenizer = tokenizer_for_inference(target)
    _set_template(wanted, tokenizer)
    config, name = wanted.config, "tuned" if compare == BASE else _short(target)
    first = Side(name, target, wanted.run, tokenizer, config, held_out(config, tokenizer))
    if compare is None:
        return [first]
    if compare == BASE:
        if wanted.run is None:
            raise ConfigError(
                f"--compare base: {target} is no run, which would say what its base is; give the base's folder or name"
            )
        if wanted.run.adapter.lora_model_dir:
            log.info("the base is %s without the adapter that the run began with", wanted.run.model.base_model)
        return [first, Side(BASE, None, wanted.run, tokenizer, config, first.data)]
    other = tokenizer_for_inference(compare)
    _set_template(wanted, other, tokenizer)
    same = other.get_vocab() == tokenizer.get_vocab() and other.chat_template == tokenizer.chat_template
    if not same:
        log.warning(
            "the two tokenizers differ: each model has the rows as its own cuts them, and a loss per token of one is "
            "not that of the other; exact match can be compared"
        )
    name = _short(compare) if _short(compare) != first.name else compare
    return [first, Side(name, compare, None, other, config, first.data if same else held_out(config, other))]


def _set_template(
    wanted: Wanted, tokenizer: PreTrainedTokenizerBase, like: PreTrainedTokenizerBase | None = None
) -> None:
    """Set the chat template that the config chooses; a run has its own already. `like` is whose is taken where a model
    has none."""
    data = wanted.config.data
    if like is not None or not wanted.own or tokenizer.chat_template is None:
        chosen = templates.chosen(data.chat_template, data.chat_template_jinja, tokenizer.chat_template)
        tokenizer.chat_template = chosen
    entries = data.test_datasets or data.datasets
    if tokenizer.chat_template is not None or not any(is_chat(entry.type) for entry in entries):
        return
    if like is None or like.chat_template is None:
        raise ConfigError(
            "conversations need a chat template, and this model's tokenizer brings none: set chat_template in a "
            "config, and give that to --data"
        )
    log.info("the model to compare with has no chat template: it is asked in the other one's")
    tokenizer.chat_template = like.chat_template


def _common_rows(sides: Sequence[Side], limit: int | None, seed: int) -> npt.NDArray[np.int64]:
    """Numbers of the rows that all sides have, ascending."""
    rows = np.unique(sides[0].data.documents.rows)
    for side in sides[1:]:
        before = rows
        rows = np.intersect1d(rows, side.data.documents.rows)
        if len(rows) < len(before):
            log.warning("%d rows are left out: %s does not take them", len(before) - len(rows), side.name)
    if not len(rows):
        raise DataError("no row is left to measure on")
    if limit is not None and limit < len(rows):
        rows = np.sort(np.random.default_rng(seed).permutation(rows)[:limit])
    return rows


def _choose(side: Side, rows: npt.NDArray[np.int64], short_answer: int) -> None:
    """The side's documents of these rows, and the questions among them that have a short answer."""
    documents = side.data.documents
    side.documents = np.flatnonzero(np.isin(documents.rows, rows))
    if side.config.preference.rl is not None:
        return
    ends = set(terminator_ids(side.tokenizer, side.config))
    for index in side.documents.tolist():
        question = question_of(documents, index, side.tokenizer, ends)
        if question is not None and question.ends and 0 < question.tokens <= short_answer:
            side.questions[int(documents.rows[index])] = question


def _groups(
    data: HeldOut, rows: npt.NDArray[np.int64], by: Sequence[str], columns: dict[int, dict[str, str]]
) -> dict[str, list[str]]:
    groups = {"dataset": data.datasets_of(rows)} if len(data.entries) > 1 else {}
    return groups | {name: [columns[row][name] for row in rows.tolist()] for name in by}


def _said(wanted: Wanted, side: Side, rows: npt.NDArray[np.int64]) -> str:
    tokens = int(side.data.documents.trained[side.documents].sum())
    held = side.data.what == "val_set_size"
    how = f" (held out by val_set_size: {wanted.config.data.val_set_size})" if held else ""
    if wanted.config.preference.rl is not None:
        return f"{wanted.described}{how}: {len(rows):,} pairs"
    asked = f"{len(side.questions):,} short answers"
    return f"{wanted.described}{how}: {len(rows):,} rows, {tokens:,} tokens to predict, {asked}"


def _short(path: str) -> str:
    folder = Path(path).expanduser()
    return folder.resolve().name if folder.exists() else path


# --- a model on it ------------------------------------------------------------------------------------------


def _measure(side: Side, device: torch.device, dtype: torch.dtype | None, tokens_per_pass: int | None) -> None:
    model = _open(side, device, dtype)
    chosen = side.data.documents.subset(side.documents)
    name = side.path or side.config.model.base_model
    longest = int(chosen.part_lengths.max())
    check_length(side.config.replace("the model that is measured", base_model=name), model.config, longest)
    policy = build_policy(model, None, side.config.data.sequence_len)
    if tokens_per_pass is None:
        budget = find_budget(policy, chosen, device)
        log.info("%s: %s", side.name, budget)
        tokens_per_pass = budget.tokens
    with Progress(f"{side.name}: scoring", len(chosen)) as progress:
        score = score_documents if side.config.preference.rl is None else score_pairs
        side.scores = score(policy, chosen, device, tokens_per_pass=tokens_per_pass, on_done=progress.advance)
    if side.questions:
        questions = list(side.questions.values())
        ends = {*terminator_ids(side.tokenizer, side.config), *default_terminators(model)}
        with Progress(f"{side.name}: answering", len(questions)) as progress:
            answers = greedy_answers(
                model,
                side.tokenizer,
                sorted(ends),
                [question.prompt_ids for question in questions],
                max_new_tokens=max(question.tokens for question in questions) + SLACK,
                on_done=progress.advance,
            )
        side.answers = dict(zip(side.questions, answers, strict=True))
    side.described = {
        "path": name,
        "dtype": str(model.dtype)[6:],
        "device": str(device),
        "tokens_per_pass": tokens_per_pass,
    }


def _open(side: Side, device: torch.device, dtype: torch.dtype | None) -> PreTrainedModel:
    if side.path is None:
        assert side.run is not None
        return open_base(side.run, side.tokenizer, device=device, dtype=dtype)
    return open_for_inference(side.path, device=device, dtype=dtype)[0]


# --- rows ---------------------------------------------------------------------------------------------------


def _figures(sides: Sequence[Side], rows: npt.NDArray[np.int64]) -> list[RowFigures]:
    """Of each side, row by row."""
    section = sides[0].config.preference
    if section.rl is None:
        return [_by_row(side, rows) for side in sides]
    assert section.rl_beta is not None
    found = []
    base = next((side.scores for side in sides if side.path is None), None)
    for side in sides:
        assert isinstance(side.scores, PairScores) and (base is None or isinstance(base, PairScores))
        reference = None if side.path is None else base
        found.append(pair_figures(side.scores, reference, section.rl, section.rl_beta))
    return found


def _by_row(side: Side, rows: npt.NDArray[np.int64]) -> RowFigures:
    """Sums of the documents of each row; a row of raw text may be several."""
    assert isinstance(side.scores, DocumentScores)
    owner = np.searchsorted(rows, side.rows)

    def add_up(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        return np.bincount(owner, values, minlength=len(rows)).astype(np.float64)

    exact, stopped = np.full(len(rows), np.nan), np.full(len(rows), np.nan)
    for row, answer in side.answers.items():
        place = int(np.searchsorted(rows, row))
        exact[place] = is_exact(answer.shown, side.questions[row].expected)
        stopped[place] = answer.stopped
    tokens = add_up(side.scores.tokens)
    columns: dict[str, tuple[npt.NDArray[np.float64], npt.NDArray[np.float64] | None]] = {
        "loss": (add_up(side.scores.nll), tokens),
        "token_accuracy": (add_up(side.scores.correct), tokens),
        "exact_match": (exact, None),
        "stopped": (stopped, None),
    }
    return RowFigures(tokens, columns)


def _row_lines(
    sides: Sequence[Side], rows: npt.NDArray[np.int64], columns: dict[int, dict[str, str]]
) -> Iterator[dict[str, Any]]:
    """A line for each document of the target, with what each model made of it."""
    target = sides[0]
    data = target.data
    is_pairs = target.config.preference.rl is not None
    of_rows = _figures(sides, rows)
    names = data.datasets_of(rows)
    first = {row: place for place, row in reversed(list(enumerate(target.rows.tolist())))}
    ends = set(terminator_ids(target.tokenizer, target.config))
    for number, row in enumerate(rows.tolist()):
        index = int(target.documents[first[row]])
        line: dict[str, Any] = {
            "dataset": names[number],
            "location": data.documents.location(index),
            **({"by": columns[row]} if columns else {}),
        }
        if is_pairs:
            line |= pair_texts(data.documents, index, target.tokenizer)
        else:
            question = question_of(data.documents, index, target.tokenizer, ends)
            prompt = [] if question is None else question.prompt_ids
            whole = data.documents[index].input_ids.tolist()
            line["prompt"] = decode(target.tokenizer, prompt)
            line["expected"] = decode(target.tokenizer, whole) if question is None else question.expected
        for role, side, found in zip(("target", "compare"), sides, of_rows, strict=False):
            if isinstance(side.scores, PairScores):
                line[role] = pair_line(side.scores, number)
            else:
                line[role] = _model_line(side, found, number, row)
        yield line


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
