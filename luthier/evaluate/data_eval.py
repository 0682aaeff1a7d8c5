"""A model, or two, on rows of data: loss, token accuracy and short answers, with intervals, by dataset and by column.

What is measured on is settled first, with tokenizers alone; then one model is loaded at a time. Two models are
measured on the same rows, so that they can be compared row by row.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from luthier.config.preference import has_reference, unit_of
from luthier.data import templates
from luthier.data.held_out import HeldOut, held_out
from luthier.data.tokenizer import is_chat, terminator_ids
from luthier.errors import ConfigError, DataError
from luthier.evaluate.answers import SHORT_ANSWER, SLACK, greedy_answers, question_of
from luthier.evaluate.figures import all_figures
from luthier.evaluate.general import GROUP, general_data, general_set, limit_of
from luthier.evaluate.general import NAME as GENERAL
from luthier.evaluate.labelled import score_labelled
from luthier.evaluate.measure import DTYPES, find_budget, score_documents
from luthier.evaluate.pairs import score_pairs
from luthier.evaluate.progress import Progress
from luthier.evaluate.results import check_writable, results_folder, write_results
from luthier.evaluate.sides import Side, of_rows, row_lines
from luthier.evaluate.what_data import Wanted, must_exist, what_data
from luthier.generate.engine import default_terminators
from luthier.models.assemble import open_base, open_for_inference, tokenizer_for_inference
from luthier.models.device import choose_device
from luthier.models.isolation import build_policy
from luthier.models.memory import free_unused
from luthier.models.rope import check_length

log = logging.getLogger("luthier")

Dtype = Literal["auto", "fp32", "bf16", "fp16"]
BASE = "base"


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
    general: bool = False,
) -> tuple[Path, dict[str, Any]]:
    """Measure a run, an adapter or a model, and write `NAME.json` and `NAME.jsonl`.

    Args:
        data: a config, or data files; none for what the run itself was validated on. type: of the rows in the files;
            None for that of the run. compare: another model, or `base` for the run's own. by: columns to group by.
        limit: so many rows, drawn by the seed. short_answer: most tokens of an answer that is asked for; 0 asks none.
        tokens_per_pass: None finds it. output: a folder in place of the run's.
        general: on the general set in place of data; a run beside its base unless told otherwise.

    Returns:
        The JSON's path and content.

    Raises:
        ConfigError, DataError: before a model is loaded. ModelError, RunError.
    """
    # 1. What is measured on, by tokenizers alone.
    wanted = general_data(target) if general else what_data(target, data, type)
    rl = wanted.config.preference.rl
    if has_reference(rl) and wanted.run is not None and compare is None:
        log.info("rl: %s: rewards are against the base, which is measured too (--compare base)", rl)
        compare = BASE
    if general:
        compare, by = compare or (BASE if wanted.run is not None else None), [GROUP]
    sides = _sides(target, compare, wanted)
    rows = _common_rows(sides, limit, seed)
    columns = sides[0].data.columns(by, rows.tolist()) if by else {}
    for side in sides:
        _choose(side, rows)
    _ask(sides, short_answer)
    groups = _groups(sides[0].data, rows, by, columns)
    log.info("%s", _said(wanted, sides[0], rows))
    folder = results_folder(target, output)
    check_writable(folder)

    # 2. One model after the other.
    place = choose_device(device or (wanted.run.model.device_map if wanted.run else None))
    for number, side in enumerate(sides):
        if number:
            free_unused(place)
        _measure(side, place, DTYPES[dtype], tokens_per_pass)

    # 3. Figures, and the rows.
    found = of_rows(sides, rows, seed)
    figures = all_figures(found[0].figures, found[1].figures if compare else None, groups, seed)
    if found[0].answers is not None and found[0].answers.kl is not None:
        figures["all"]["target"]["kl"] = found[0].answers.kl
    return write_results(
        folder,
        wanted.name if limit is None else f"{wanted.name}-limit{limit}",
        kind=GENERAL if general else "data",
        target=target,
        compare=None if compare is None else (sides[1].path or sides[1].config.model.base_model),
        figures=figures,
        rows=row_lines(sides, rows, columns, found),
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
    first = Side(name, target, wanted.run, tokenizer, config, _documents(wanted, tokenizer))
    if compare is None:
        return [first]
    if compare == BASE:
        if wanted.run is None:
            raise ConfigError(
                f"--compare base: {target} is no run, which would say what its base is; give the base's folder or name"
            )
        if adapter := wanted.run.adapter.lora_model_dir:
            # What rewards are against is the model as the run began.
            how = f"with the adapter {adapter}," if has_reference(config.preference.rl) else "without the adapter"
            log.info("the base is %s %s that the run began with", wanted.run.model.base_model, how)
        return [first, Side(BASE, None, wanted.run, tokenizer, config, first.data)]
    must_exist(compare)
    other = tokenizer_for_inference(compare)
    _set_template(wanted, other, tokenizer)
    same = other.get_vocab() == tokenizer.get_vocab() and other.chat_template == tokenizer.chat_template
    if not same:
        log.warning(
            "the two tokenizers differ: each model has the rows as its own cuts them, and a loss per token of one is "
            "not that of the other; exact match can be compared"
        )
    name = _short(compare) if _short(compare) != first.name else compare
    return [first, Side(name, compare, None, other, config, first.data if same else _documents(wanted, other))]


def _documents(wanted: Wanted, tokenizer: PreTrainedTokenizerBase) -> HeldOut:
    if wanted.general:
        return general_set(tokenizer, limit_of(wanted.config))
    return held_out(wanted.config, tokenizer)


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


def _choose(side: Side, rows: npt.NDArray[np.int64]) -> None:
    """The side's documents of these rows, and the questions among them."""
    documents = side.data.documents
    side.documents = np.flatnonzero(np.isin(documents.rows, rows))
    if side.config.preference.rl is not None:
        return
    ends = set(terminator_ids(side.tokenizer, side.config))
    for index in side.documents.tolist():
        question = question_of(documents, index, side.tokenizer, ends)
        if question is not None and question.ends and question.tokens:
            side.questions[int(documents.rows[index])] = question


def _ask(sides: Sequence[Side], short_answer: int) -> None:
    """Keep the questions that have a short answer in the target's tokens, and that all sides have."""
    short = {row for row, question in sides[0].questions.items() if question.tokens <= short_answer}
    asked = short.intersection(*(side.questions for side in sides))
    for side in sides:
        side.questions = {row: question for row, question in side.questions.items() if row in asked}


def _groups(
    data: HeldOut, rows: npt.NDArray[np.int64], by: Sequence[str], columns: dict[int, dict[str, str]]
) -> dict[str, list[str]]:
    groups = {"dataset": data.datasets_of(rows)} if len(data.entries) > 1 else {}
    return groups | {name: [columns[row][name] for row in rows.tolist()] for name in by}


def _said(wanted: Wanted, side: Side, rows: npt.NDArray[np.int64]) -> str:
    tokens = int(side.data.documents.trained[side.documents].sum())
    held = side.data.what == "val_set_size"
    how = f" (held out by val_set_size: {wanted.config.data.val_set_size})" if held else ""
    if (rl := wanted.config.preference.rl) is not None:
        count = len(side.documents) if rl == "kto" else len(rows)
        return f"{wanted.described}{how}: {_count(count, unit_of(rl).removesuffix('s'))}"
    asked = _count(len(side.questions), "short answer")
    counts = _count(len(rows), "row"), f"{_count(tokens, 'token')} to predict", asked
    return f"{wanted.described}{how}: {', '.join(counts)}"


def _count(number: int, thing: str) -> str:
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


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
        score: Any = score_documents if side.config.preference.rl is None else score_pairs
        if side.config.preference.rl == "kto":
            score = partial(score_labelled, sequence_len=side.config.data.sequence_len)
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
        adapter = side.run.adapter.lora_model_dir if has_reference(side.config.preference.rl) else None
        return open_base(side.run, side.tokenizer, adapter=adapter, device=device, dtype=dtype)
    return open_for_inference(side.path, device=device, dtype=dtype)[0]
