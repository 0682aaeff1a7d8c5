"""`luthier judge A B`: which of two gives the better answers, pair by pair, as another model or a person sees it.

The command puts the parts together: questions and answers (`answers`), the judge (`client`, `local`,
`human`), both orders of every pair (`rounds`), the result (`tally`). All that costs time or money is
in JSONL files in the results' folder as soon as it is there, and is never done again.
"""

from __future__ import annotations

import json
import logging
import re
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from luthier.errors import ConfigError, DataError, LuthierError
from luthier.evaluate.judge.answers import (
    Answers,
    Prompt,
    Side,
    answers_of,
    base_of,
    is_base_of,
    open_side,
    read_prompts,
)
from luthier.evaluate.judge.budget import Purse, Use
from luthier.evaluate.judge.client import Endpoint
from luthier.evaluate.judge.human import ask_person, human_tasks
from luthier.evaluate.judge.name import (
    OPENAI_KEY,
    JudgeName,
    Limits,
    api_key,
    judge_name,
    limits_of,
    own_judge,
)
from luthier.evaluate.judge.question import CRITERIA, FORM, LOCAL_FORM
from luthier.evaluate.judge.rounds import Pair, Round, Task, ask_all, tasks_of
from luthier.evaluate.judge.tally import figures_of, lines_of, many, pair_row
from luthier.evaluate.page import draw_again
from luthier.evaluate.results import digest, results_folder, write_results
from luthier.generate.jsonl import Rows
from luthier.generate.terminated import Terminated, ended_by_sigterm

log = logging.getLogger("luthier")

INCOMPLETE = 3  # exit status: some pairs have no verdict yet; the same command goes on with them


def command(
    a: Annotated[str, typer.Argument(metavar="A", help="Run, adapter, model, hub id, or a JSONL of answers.")],
    b: Annotated[
        str, typer.Argument(metavar="B", help="What A is compared with, likewise; base: what A was trained from.")
    ],
    prompts: Annotated[
        Path,
        typer.Option(help="Text, one question a line, or rows with prompt, instruction and input, or messages."),
    ],
    judge: Annotated[
        str | None, typer.Option(help="openai:MODEL, http://HOST/v1#MODEL, or local:PATH.", metavar="JUDGE")
    ] = None,
    human: Annotated[bool, typer.Option("--human", help="Ask a person, here in the terminal, blind.")] = False,
    criteria: Annotated[str | None, typer.Option(help="What makes an answer better: text, or a file of it.")] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder of the results. Default: A/evaluation of a run, else evaluation/A.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Take the first so many prompts.")] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest answer of A and B. Default: the model's own, else 512.")
    ] = None,
    max_cost: Annotated[float | None, typer.Option(help="Dollars that all verdicts together may cost.")] = None,
    max_tokens_total: Annotated[
        int | None, typer.Option(min=1, help="Tokens that all verdicts together may use, in and out.")
    ] = None,
    price_in: Annotated[float | None, typer.Option(min=0, help="Dollars per million tokens in.")] = None,
    price_out: Annotated[float | None, typer.Option(min=0, help="Dollars per million tokens out.")] = None,
    parallel: Annotated[int, typer.Option(min=1, max=256, help="Requests at a time.")] = 4,
    retries: Annotated[int, typer.Option(min=0, help="Further attempts after a failed request.")] = 5,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds for one request.")] = 120.0,
    judge_tokens: Annotated[int, typer.Option(min=16, help="Longest answer of the judge.")] = 1024,
    api_key_env: Annotated[
        str | None,
        typer.Option(help=f"Variable that holds the key. Default: {OPENAI_KEY} for openai:, none for other hosts."),
    ] = None,
    allow_self_judging: Annotated[
        bool, typer.Option("--allow-self-judging", help="Let a model judge its own answers.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Draws the order in which a person sees pairs and answers.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON, and no table.")] = False,
) -> int:
    """Compare the answers of A and B, pair by pair, by a judge: a model behind an endpoint, a local one, or a person.

    A pair counts if the judge names the same winner in both orders. Exit status: 0 if all pairs were judged, 3 if some
    wait or failed (the same command goes on with them).
    """
    name = judge_name(judge, human)
    if as_json and name.is_human:
        raise ConfigError("--json: with --human the terminal is the person's; the results' folder has the same JSON")
    prices = price_in, price_out
    limits = limits_of(name, max_cost, max_tokens_total, prices, parallel, retries, timeout, judge_tokens)
    key = api_key(name, api_key_env)
    standard = _criteria(criteria)
    questions = read_prompts(prompts.expanduser(), limit)
    if b == "base" and not Path(b).exists():
        b = base_of(a)
    sides = open_side(a), open_side(b)
    if _key_of(sides[0]) == _key_of(sides[1]):
        raise ConfigError(f"A and B are both {a}: there is nothing to compare")
    kin = [(side.target, shared) for side in sides if (shared := own_judge(name, side))]
    if kin and not allow_self_judging:
        target, shared = kin[0]
        raise ConfigError(
            f"--judge {judge}: {target} is, or was made from, the judge or its base ({shared}), and models prefer "
            "their own answers. Choose another judge, or add --allow-self-judging"
        )
    for target, shared in kin:
        log.warning("%s is, or was made from, the judge or its base (%s): this says less", target, shared)
    folder = results_folder(a, output.expanduser() if output else None)
    pairs, unanswered = _pairs(sides, questions, folder, max_new_tokens)
    store = folder / f"judge-verdicts-{_slug(name.model)}-{digest(name.key)[:6]}.jsonl"
    parts = [*map(_key_of, sides), name.key, standard, str(prompts.resolve())]
    stem = f"judge-{_slug(b)}-by-{_slug(name.model)}-on-{_slug(prompts.stem)}-{digest(parts)[:6]}"
    with Rows(store) as rows:
        verdicts: dict[str, Mapping[str, Any]] = {row["key"]: row for row in rows.stored if "choice" in row}
        if name.is_human:
            order = human_tasks([pair for pair in pairs if not pair.identical], standard, verdicts, seed)
            tasks = dict(order) | {pair: () for pair in pairs if pair.identical}
        else:
            form = LOCAL_FORM if name.kind == "local" else FORM
            tasks = {pair: tasks_of(pair, name.key, standard, form) for pair in pairs}
        todo = [task for pair, own in tasks.items() for task in own if task.key not in verdicts and not pair.identical]
        _say_what_is_stored(tasks, verdicts, todo)
        outcome = Round()
        use, ended = _judge(name, key, limits, standard, tasks, todo, rows, verdicts, outcome)
    found = [pair_row(pair, own, verdicts, outcome.failed) for pair, own in tasks.items()]
    figures = figures_of(found, unanswered) | _spent(use, limits.price)
    if not ended or any(row["verdicts"] for row in found):
        path, result = write_results(
            folder, stem, kind="judge",
            target=a, compare="base" if is_base_of(b, a) else b, figures=figures, rows=found,
            judge=name.model, criteria=standard, prompts=str(prompts), orders=1 if name.is_human else 2,
            verdicts=store.name, self_judging=bool(kin),
        )  # fmt: skip
        if as_json:
            print(json.dumps(result, indent=2, ensure_ascii=False))
        else:
            print("\n".join(["", *lines_of(figures, a, b, orders=1 if name.is_human else 2)]))
            _say_spending(use, limits)
            print(f"{path} and its .jsonl hold every verdict")
        draw_again(a, output.expanduser() if output else None)
    if isinstance(ended, Terminated):
        log.warning("stopped by SIGTERM; the same command goes on from there")
        raise SystemExit(128 + signal.SIGTERM)
    if ended is not None:
        raise ended
    return 0 if figures["complete"] else INCOMPLETE


def _judge(
    name: JudgeName,
    key: str | None,
    limits: Limits,
    criteria: str,
    tasks: Mapping[Pair, Sequence[Task]],
    todo: Sequence[Task],
    rows: Rows,
    verdicts: dict[str, Mapping[str, Any]],
    outcome: Round,
) -> tuple[Use, BaseException | None]:
    """Ask for what is to be done, and note in `outcome` what came of it. Gives what all verdicts of these pairs have
    used, and the error or signal that ended it early, which is for later: what was judged before is shown first."""
    keys = {task.key for own in tasks.values() for task in own}
    spent = Use()
    for row in rows.stored:
        if row.get("key") in keys and name.kind == "endpoint":
            spent += Use(row.get("tokens_in", 0), row.get("tokens_out", 0))
    purse = Purse(limits.price, limits.max_cost, limits.max_tokens, spent)
    ended: BaseException | None = None
    try:
        with ended_by_sigterm():
            if not todo:
                pass
            elif name.is_human:
                ask_person(todo, criteria, rows, verdicts)
            elif name.kind == "local":
                from luthier.evaluate.judge.local import LocalJudge

                ask_all(todo, LocalJudge(name.model).ask, name.model, rows, verdicts, outcome)
            else:
                endpoint = Endpoint(
                    name.url, name.model, key, purse,
                    retries=limits.retries, timeout=limits.timeout, most_out=limits.judge_tokens,
                )  # fmt: skip
                threads = min(limits.threads, len(todo))
                ask_all(
                    todo, endpoint.ask, name.model, rows, verdicts, outcome, threads=threads, stop=endpoint.stop
                )  # fmt: skip
    except (LuthierError, KeyboardInterrupt) as error:
        ended = error
    if outcome.capped:
        log.warning("stopped at the cap: the next request could go beyond it. A higher one goes on from here")
    if outcome.wordless:
        log.warning("of %d verdicts %d came without an argument", outcome.asked, outcome.wordless)
    if purse.unreported:
        log.warning(
            "of %d requests the judge did not say what they used; they are counted with the most that they can have",
            purse.unreported,
        )
    return purse.spent, ended


def _criteria(given: str | None) -> str:
    if given is None:
        return CRITERIA
    path = Path(given).expanduser()
    try:
        is_file = path.is_file()
    except (OSError, ValueError):  # too long for the name of a file: a text
        is_file = False
    if not is_file and re.fullmatch(r"\S+\.(txt|md)", given):
        raise ConfigError(f"--criteria {given}: there is no such file")
    text = path.read_text(encoding="utf-8") if is_file else given
    if not text.strip():
        raise ConfigError("--criteria: it is empty")
    return text.strip()


# --- the pairs -----------------------------------------------------------------------------------------------------


def _pairs(
    sides: tuple[Side, Side], prompts: Sequence[Prompt], folder: Path, max_new_tokens: int | None
) -> tuple[list[Pair], dict[str, int]]:
    """What is to be judged, and how many prompts each side has no answer to."""
    both: list[Answers] = []
    for label, side in zip("AB", sides, strict=True):
        kept = folder / f"answers-{_slug(side.target)}-{digest(_key_of(side))[:6]}.jsonl"
        answers = answers_of(side, prompts, kept, max_new_tokens)
        both.append(answers)
        if answers.unanswered:
            question, reason = next(iter(sorted(answers.unanswered.items())))
            count = len(answers.unanswered)
            log.warning(
                "%s (%s) has no answer to %d of %d prompts, which are left out; first: %r: %s",
                label, side.target, count, len(prompts), question[:60], reason,
            )  # fmt: skip
        if answers.cut:
            log.warning(
                "%s (%s): %d of %d answers were cut off, see --max-new-tokens",
                label, side.target, answers.cut, len(prompts),
            )  # fmt: skip
    first, second = (answers.by_question for answers in both)
    asked = [p.question for p in prompts]
    pairs = [Pair(q, first[q], second[q]) for q in asked if q in first and q in second]
    if not pairs:
        raise DataError(f"there is no prompt that both {sides[0].target} and {sides[1].target} have answered")
    return pairs, {"a": len(both[0].unanswered), "b": len(both[1].unanswered)}


def _key_of(side: Side) -> str:
    return str(Path(side.target).expanduser().resolve()) if Path(side.target).expanduser().exists() else side.target


def _slug(name: str) -> str:
    last = Path(name.rstrip("/")).name or name
    return re.sub(r"[^A-Za-z0-9._-]+", "-", last.removesuffix(".jsonl")).strip("-.")[:40] or "model"


# --- words ---------------------------------------------------------------------------------------------------------


def _say_what_is_stored(
    tasks: Mapping[Pair, Sequence[Task]], verdicts: Mapping[str, Any], todo: Sequence[Task]
) -> None:
    known = sum(task.key in verdicts for pair, own in tasks.items() for task in own if not pair.identical)
    stored = f"; stored: {many(known, 'verdict')}" if known else ""
    log.info("%s%s; to ask for: %s", many(len(tasks), "pair"), stored, many(len(todo), "verdict"))


def _spent(use: Use, price: tuple[float, float] | None) -> dict[str, Any]:
    return {"tokens_in": use.tokens_in, "tokens_out": use.tokens_out, "cost": use.cost(price)}


def _say_spending(use: Use, limits: Limits) -> None:
    if use.total:
        price, dollars = limits.price, ""
        if price is not None:
            dollars = f", ${use.cost(price):.4f} at ${price[0]:g} and ${price[1]:g} a million"
        print(f"all verdicts together: {use.tokens_in:,} tokens in, {use.tokens_out:,} out{dollars}")
