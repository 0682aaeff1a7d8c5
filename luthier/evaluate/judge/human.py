"""A person as the judge: blind, in random order, in the terminal, as long as they like.

Each pair is shown once, for a person's time is short: which answer stands first, and which pair comes next, is drawn
from the seed and the pair, so that neither place nor order says which model wrote what. Each verdict is stored at
once, and the same command goes on with the rest.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from luthier.evaluate.judge.question import FIRST, SECOND, TIE
from luthier.evaluate.judge.rounds import Pair, Task, tasks_of, verdict_row
from luthier.evaluate.results import digest
from luthier.generate.jsonl import Rows

HUMAN = "human"
HELP = "1 or 2: the better answer; 0: neither; a reason may follow (2 the sum is wrong); q: stop here"


def human_tasks(
    pairs: Sequence[Pair], criteria: str, verdicts: Mapping[str, Any], seed: int
) -> list[tuple[Pair, tuple[Task, ...]]]:
    """One order of each pair, in a random sequence: the one that has a verdict already, else one that is drawn."""
    found = []
    for pair in pairs:
        both = tasks_of(pair, HUMAN, criteria)
        drawn = int(digest([seed, pair.question, sorted((pair.a, pair.b))]), 16)
        # Drawn between the answers and not between A and B: swapping the sides of the command changes nothing.
        sorted_first = drawn % 2 == 0
        chosen = both[0] if (pair.a <= pair.b) == sorted_first else both[1]
        judged = [task for task in both if task.key in verdicts]
        found.append((drawn >> 1, pair, (judged[0] if judged else chosen,)))
    return [(pair, tasks) for _, pair, tasks in sorted(found, key=lambda each: each[0])]


def ask_person(tasks: Sequence[Task], criteria: str, rows: Rows, verdicts: dict[str, Mapping[str, Any]]) -> None:
    """Show each pair and store what the person says, until they stop (q, or the end of input)."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # a stray byte is a wrong key, or a blot in a reason
    if tasks:
        print(f"{criteria}\n\n{HELP}")
    for number, task in enumerate(tasks, start=1):
        first, second = (task.pair.a, task.pair.b) if task.a_first else (task.pair.b, task.pair.a)
        print(f"\n===== {number} of {len(tasks)} =====\n{visible(task.pair.question)}")
        print(f"\n----- answer 1 -----\n{visible(first)}\n\n----- answer 2 -----\n{visible(second)}\n")
        said = _reply()
        if said is None:
            return
        choice, reason = said
        row = verdict_row(task, HUMAN, choice, reason)
        rows.append(row)
        verdicts[task.key] = row


def _reply() -> tuple[int, str] | None:
    """The choice and the reason; None: stop."""
    while True:
        print("better (1, 2, 0, q): ", end="", flush=True)
        line = sys.stdin.readline()
        if not line or line.strip().lower() in ("q", "quit"):
            print()
            return None
        word, _, reason = line.strip().partition(" ")
        if word in (str(TIE), str(FIRST), str(SECOND)):
            return int(word), reason.strip()
        print(HELP)


def visible(text: str) -> str:
    """The text without what would move the cursor or change the terminal; such characters are shown as escapes."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)
