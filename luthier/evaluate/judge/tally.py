"""From verdicts to a result: which pairs count, who won, and how sure that is.

A pair counts if both orders name the same winner, or both none. Two orders that contradict each other are a flip; a tie
in one order and a winner in the other has wavered. Neither counts, and both are shown: many of them mean that the judge
cannot tell the two apart.

A's score is its wins and half the ties, of the pairs that count. The intervals are Wilson's (Brown, Cai and DasGupta
2001): right for few pairs and for shares near 0 and 1, where a bootstrap of 5 wins in 5 would claim certainty. For the
score, whose halves vary less than wins and losses, they are on the wide side.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from luthier.evaluate.judge.question import FIRST, TIE
from luthier.evaluate.judge.rounds import Pair, Task

Z = 1.959963984540054  # of 95%


def wilson(successes: float, total: int) -> tuple[float, float] | None:
    """The 95% interval of a share; None of nothing."""
    if not total:
        return None
    share, square = successes / total, Z * Z
    middle = (share + square / (2 * total)) / (1 + square / total)
    half = Z / (1 + square / total) * math.sqrt(share * (1 - share) / total + square / (4 * total * total))
    return max(0.0, middle - half), min(1.0, middle + half)


def winner_of(choice: int, a_first: bool) -> str:
    """`a`, `b` or `tie`, whatever the order was."""
    if choice == TIE:
        return "tie"
    return "a" if (choice == FIRST) == a_first else "b"


def pair_row(
    pair: Pair, tasks: Sequence[Task], verdicts: Mapping[str, Mapping[str, Any]], failed: Mapping[str, str]
) -> dict[str, Any]:
    """A pair with its outcome and its verdicts.

    `outcome`: `a`, `b`, `tie`; `identical` (a tie that nobody was asked about); `flip`, `wavered` (not counted);
    `failed`, `waiting` (not judged in every order yet).
    """
    given = [(task, verdicts[task.key]) for task in tasks if task.key in verdicts]
    shown = [
        {
            "first": "a" if task.a_first else "b",
            "winner": winner_of(row["choice"], task.a_first),
            "argument": _writable(row["argument"]),
        }
        for task, row in given
    ]
    winners = {each["winner"] for each in shown}
    if pair.identical:
        outcome = "identical"
    elif len(given) < len(tasks):
        outcome = "failed" if any(task.key in failed for task in tasks) else "waiting"
    elif len(winners) == 1:
        (outcome,) = winners
    else:
        outcome = "wavered" if "tie" in winners else "flip"
    texts = {"prompt": pair.question, "a": pair.a, "b": pair.b}
    return {name: _writable(text) for name, text in texts.items()} | {"outcome": outcome, "verdicts": shown}


def _writable(text: str) -> str:
    """The text without halves of characters, which JSON can hold and UTF-8 cannot."""
    return text.encode("utf-8", "replace").decode("utf-8")


def figures_of(rows: Sequence[Mapping[str, Any]], unanswered: Mapping[str, int]) -> dict[str, Any]:
    """Counts, shares and intervals over all pairs. `unanswered`: prompts that a side has no answer to, `a` and `b`."""
    outcomes = Counter(row["outcome"] for row in rows)
    wins, losses = outcomes["a"], outcomes["b"]
    ties = outcomes["tie"] + outcomes["identical"]
    counted = wins + ties + losses
    leaning = Counter(
        each["winner"]
        for row in rows
        if row["outcome"] == "wavered"
        for each in row["verdicts"]
        if each["winner"] != "tie"
    )
    decided = [(each["first"], each["winner"]) for row in rows for each in row["verdicts"] if each["winner"] != "tie"]
    flipped = Counter(
        "first" if row["verdicts"][0]["winner"] == row["verdicts"][0]["first"] else "second"
        for row in rows
        if row["outcome"] == "flip"
    )
    interval = wilson(wins + ties / 2, counted)
    return {
        "pairs": len(rows),
        "counted": counted,
        **{
            name: {"count": count, "share": count / counted if counted else None, "interval": wilson(count, counted)}
            for name, count in (("wins", wins), ("ties", ties), ("losses", losses))
        },
        "score": (wins + ties / 2) / counted if counted else None,
        "score_interval": interval,
        "winner": None if interval is None else "a" if interval[0] > 0.5 else "b" if interval[1] < 0.5 else None,
        "identical": outcomes["identical"],
        "flips": {"count": outcomes["flip"], "to_first": flipped["first"], "to_second": flipped["second"]},
        "wavered": {"count": outcomes["wavered"], "towards_a": leaning["a"], "towards_b": leaning["b"]},
        "first_chosen": sum(first == winner for first, winner in decided) / len(decided) if decided else None,
        "failed": outcomes["failed"],
        "waiting": outcomes["waiting"],
        "unanswered": dict(unanswered),
        "complete": not outcomes["failed"] and not outcomes["waiting"],
    }


def lines_of(figures: Mapping[str, Any], a: str, b: str, orders: int = 2) -> Iterator[str]:
    """The result for people. `orders`: in how many each pair was asked."""
    yield f"A  {a}"
    yield f"B  {b}"
    yield ""
    yield f"{'':<10}{'pairs':>6}{'share':>9}   95% interval"
    for label, name in (("A wins", "wins"), ("ties", "ties"), ("B wins", "losses")):
        found = figures[name]
        yield f"{label:<10}{found['count']:>6}{_share(found['share']):>9}   {_interval(found['interval'])}".rstrip()
    yield f"{'counted':<10}{figures['counted']:>6}   of {figures['pairs']}"
    yield ""
    if figures["identical"]:
        yield f"{many(figures['identical'], 'pair')} of identical answers counted as ties without asking"
    if flips := figures["flips"]["count"]:
        yield (
            f"not counted: {many(flips, 'flip')} (the two orders contradict each other: the first answer chosen twice "
            f"in {figures['flips']['to_first']}, the second in {figures['flips']['to_second']})"
        )
    wavered = figures["wavered"]
    if wavered["count"]:
        yield (
            f"not counted: {wavered['count']} wavered (a tie in one order; in the other A won "
            f"{wavered['towards_a']}, B {wavered['towards_b']})"
        )
    for name, words in (("failed", "without a verdict, see above"), ("waiting", "not judged yet")):
        if figures[name]:
            yield f"not counted: {many(figures[name], 'pair')} {words}"
    for side, count in figures["unanswered"].items():
        if count:
            yield f"left out: {many(count, 'prompt')} without an answer of {side.upper()}"
    if figures["first_chosen"] is not None and orders == 2:
        yield f"the answer shown first was chosen in {figures['first_chosen']:.0%} of the verdicts that are no ties"
    yield conclusion(figures, orders)


def conclusion(figures: Mapping[str, Any], orders: int = 2) -> str:
    """The result in a sentence."""
    if not figures["counted"]:
        judged = figures["flips"]["count"] + figures["wavered"]["count"]
        if judged and orders == 2:
            return "No winner: of no pair is the verdict the same in both orders. This judge cannot tell A from B."
        return "No winner: nothing was judged."
    score = f"A's score, wins and half the ties, is {figures['score']:.1%} ({_interval(figures['score_interval'])})"
    if figures["winner"] is None:
        return f"No winner: {score}, and 50% lies within."
    return f"{figures['winner'].upper()} is better: {score}."


def many(count: int, noun: str) -> str:
    """A number and what it counts."""
    return f"{count} {noun}" + ("" if count == 1 else "s")


def _share(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def _interval(interval: tuple[float, float] | None) -> str:
    return "" if interval is None else f"{interval[0]:.1%} to {interval[1]:.1%}"
