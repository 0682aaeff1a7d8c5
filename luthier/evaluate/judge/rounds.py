"""Every pair in both orders: what is still to be asked, by several threads, each verdict on the disk at once.

A judge tends to prefer a place (mostly the first) whatever stands there. Asked in both orders, such a preference shows
as two verdicts that contradict each other, and those are not counted (`tally`).
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from luthier.errors import RunError
from luthier.evaluate.judge.client import CapReached, NotJudged, PairFailed, Stopped
from luthier.evaluate.judge.question import FORM, Verdict, question_text
from luthier.evaluate.results import digest
from luthier.generate.jsonl import Rows

log = logging.getLogger("luthier")

FAILURES_IN_A_ROW = 4  # or one per thread, if those are more: then the judge is down, and further pairs would fail too


@dataclass(frozen=True)
class Pair:
    """A question and the answers of both sides to it."""

    question: str
    a: str
    b: str

    @property
    def identical(self) -> bool:
        """There is nothing to judge: a tie."""
        return self.a.strip() == self.b.strip()


@dataclass(frozen=True)
class Task:
    """One order of a pair. `key`: hash of the judge and of all that it is shown."""

    key: str
    pair: Pair
    text: str
    a_first: bool


@dataclass
class Round:
    """What came of asking. `failed`: key -> why; `wordless`: verdicts without an argument."""

    asked: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    wordless: int = 0
    capped: bool = False


def tasks_of(pair: Pair, judge: str, criteria: str, form: str = FORM) -> tuple[Task, Task]:
    """Both orders of a pair, A first and B first."""
    found = []
    for a_first in (True, False):
        first, second = (pair.a, pair.b) if a_first else (pair.b, pair.a)
        text = question_text(pair.question, first, second, criteria, form)
        found.append(Task(digest([judge, text]), pair, text, a_first))
    return found[0], found[1]


def verdict_row(task: Task, judge: str, choice: int, argument: str, **further: Any) -> dict[str, Any]:
    """A row of the store: the verdict and what it is about."""
    first, second = (task.pair.a, task.pair.b) if task.a_first else (task.pair.b, task.pair.a)
    return {
        "key": task.key,
        "judge": judge,
        "prompt": task.pair.question,
        "answer_1": first,
        "answer_2": second,
        "choice": choice,
        "argument": argument,
        **further,
        "asked": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def ask_all(
    tasks: Sequence[Task],
    ask: Callable[[str], Verdict],
    judge: str,
    rows: Rows,
    verdicts: dict[str, Mapping[str, Any]],
    outcome: Round,
    *,
    threads: int = 1,
    stop: threading.Event | None = None,
) -> None:
    """Ask for each task, store each verdict, put it into `verdicts` by key, and note in `outcome` what came of it.

    Ctrl-C and SIGTERM let the requests in flight end, since they are paid for; a second one does not.

    Raises:
        RunError: the judge cannot be asked, or failed many times in a row; what was judged before is stored.
    """
    stop = stop or threading.Event()
    waiting, lock = deque(tasks), threading.Lock()
    fatal: list[BaseException] = []
    in_a_row = 0

    def one(task: Task) -> None:
        nonlocal in_a_row
        try:
            found = ask(task.text)
        except NotJudged as failure:
            if failure.used.total:
                used = {"tokens_in": failure.used.tokens_in, "tokens_out": failure.used.tokens_out}
                rows.append({"key": task.key, "judge": judge, "failed": str(failure) or "not finished", **used})
            if not isinstance(failure, PairFailed):
                raise
            with lock:
                outcome.failed[task.key] = str(failure)
                # A bad request mostly lies in its pair, unless none has ever been good.
                in_a_row += not (failure.refused and outcome.asked)
                down = in_a_row >= max(FAILURES_IN_A_ROW, threads)
            log.warning("no verdict on %r: %s", task.pair.question[:60], failure)
            if down:
                raise RunError(
                    f"the judge failed {in_a_row} times in a row, the last time because {failure}. What it judged "
                    "before is kept: the same command goes on from there"
                ) from failure
            return
        further = {"tokens_in": found.tokens_in, "tokens_out": found.tokens_out, "model": found.model}
        row = verdict_row(task, judge, found.choice, found.argument, **further)
        rows.append(row)
        with lock:
            verdicts[task.key] = row
            in_a_row = 0
            outcome.asked += 1
            outcome.wordless += not found.argument.strip()
            if outcome.asked % -(-len(tasks) // 10) == 0 or outcome.asked == len(tasks):
                log.info("%d of %d verdicts", outcome.asked, len(tasks))

    def work() -> None:
        while not stop.is_set():
            with lock:
                if not waiting:
                    return
                task = waiting.popleft()
            try:
                one(task)
            except CapReached:
                outcome.capped = True
                stop.set()
            except Stopped:
                return
            except BaseException as error:
                fatal.append(error)
                stop.set()

    _run(work, threads, stop)
    if fatal:
        raise fatal[0]


def _run(work: Callable[[], None], threads: int, stop: threading.Event) -> None:
    """`work` in threads, to the end; the first Ctrl-C sets `stop` and waits for what is in flight."""
    ended: list[bool] = []

    def one() -> None:
        try:
            work()
        finally:
            ended.append(True)

    def wait() -> None:
        # Not `Thread.join`: up to Python 3.12, one that Ctrl-C interrupts takes its thread for ended (bpo-45274).
        while len(ended) < threads:
            time.sleep(0.02)

    for _ in range(threads):
        # Daemons, so that the second Ctrl-C ends the process without waiting for a server.
        threading.Thread(target=one, daemon=True).start()
    try:
        wait()
    except KeyboardInterrupt:
        stop.set()
        log.info("what is in flight is waited for, since it is paid for; the same signal again ends at once")
        wait()
        raise
