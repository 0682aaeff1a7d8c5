"""`luthier generate --data`: every row of a file answered, many at a time, each answer in the output as it ends.

Everything that can be wrong with the rows, the format or the file of answers is said before the model is loaded. The
same command goes on with a file that is not whole; nothing that is in it is asked again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import signal
from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from luthier.errors import ConfigError, DataError
from luthier.generate.answers import AnswerFile, carried, check_name
from luthier.generate.identity import model_files, resolved
from luthier.generate.progress import Progress
from luthier.generate.questions import Place, Question, questions, read_rows
from luthier.generate.sampling import Sampling, random_stream
from luthier.generate.terminated import Terminated, ended_by_sigterm

if TYPE_CHECKING:
    from luthier.generate.asking import Asking
    from luthier.generate.engine import Engine
    from luthier.generate.rows import Completion
    from luthier.models.assemble import Found

log = logging.getLogger("luthier")

AT_ONCE = 4096  # answers that are under way, or wait for room, at a time
ENGINES = ("luthier", "vllm")


@dataclass(frozen=True)
class Task:
    """What a command asks for; `samples`: answers to each prompt."""

    model: str
    data: Path
    output: Path
    place: Place
    sampling: Sampling
    samples: int = 1
    overwrite: bool = False
    skip_bad_rows: bool = False
    engine: str = "luthier"


@dataclass(frozen=True)
class Job:
    """An answer that is wanted. `number`: which of those to the same ids it is, for its random stream."""

    index: int
    sample: int
    ids: array[int]
    number: int


class Answerer(Protocol):
    def why_not(self, prompt_ids: Sequence[int]) -> str | None: ...
    def answer(self, jobs: Sequence[Job], on_done: Callable[[Job, Completion], None]) -> None: ...


def answer_file(task: Task) -> None:
    """Answer what is not answered yet.

    Raises:
        ConfigError, DataError, RunError, ModelError: see `questions`, `AnswerFile` and `open_engine`; and where not a
        single row could be answered.
    """
    from luthier.data.hub import notice_missing_network
    from luthier.generate.asking import Asking, own_defaults
    from luthier.models.assemble import find, tokenizer_of

    check_name(task.output)  # before thousands of rows are read
    if task.output.expanduser().resolve() == task.data.expanduser().resolve():
        raise ConfigError(f"--output {task.output} is the file of the prompts")
    if task.engine == "vllm":
        from luthier.generate.vllm import check_installed

        check_installed()
    rows = read_rows(task.data.expanduser(), task.skip_bad_rows)
    if not Path(task.model).expanduser().exists():
        notice_missing_network()
    found = find(task.model)
    tokenizer = tokenizer_of(found)
    settings = task.sampling.resolve(own_defaults(found))
    if task.samples > 1 and not settings.do_sample:
        raise ConfigError(f"--num-samples {task.samples}: greedy answers are all the same; set --temperature")
    asking = Asking.of(task.model, tokenizer, found.run, raw=task.place.raw)
    asked = questions(rows, asking, task.place, task.skip_bad_rows)
    lines = [carried(question.row, task.place.field) for question in asked]
    renamed = sorted({name for q in asked for name in q.row} - {name for line in lines for name in line})
    if renamed:
        log.info("columns with the name of one of the answer's, carried with given_ before it: %s", ", ".join(renamed))
    with AnswerFile(task.output.expanduser(), _depends_on(task, found), lines, task.samples, task.overwrite) as file:
        if file.there:
            log.info("%s: %d of %d answers are there", file.path, len(file.there), len(asked) * task.samples)
        try:
            with ended_by_sigterm():
                _answer(task, found, asking, asked, file)
                file.finish()
        except KeyboardInterrupt as error:
            log.warning(
                "%s: %d of %d answers are there; the same command goes on from there",
                file.path, len(file.there), len(asked) * task.samples,
            )  # fmt: skip
            if isinstance(error, Terminated):
                raise SystemExit(128 + signal.SIGTERM) from None
            raise
        _say(file, len(asked), task.samples)


def _depends_on(task: Task, found: Found) -> dict[str, Any]:
    """What the answers depend on beside the rows."""
    from luthier.models.load import read_model_config

    files = model_files(str(found.folder or task.model))
    values: dict[str, Any] = {"model": resolved(task.model)}
    values["files"] = hashlib.sha256(json.dumps(files).encode()).hexdigest()[:16]
    if found.folder is None:
        values["commit"] = getattr(read_model_config(found.loading.model), "_commit_hash", None)
    place = {name: value for name, value in asdict(task.place).items() if value}
    return {**values, "engine": task.engine, **place, **asdict(task.sampling)}


def _answer(task: Task, found: Found, asking: Asking, asked: Sequence[Question], file: AnswerFile) -> None:
    """Put into the file what is not there."""
    jobs = [job for job in _jobs(asked, task.samples) if (job.index, job.sample) not in file.there]
    if not jobs:
        return
    for job in jobs:
        if reason := asked[job.index].why_not:
            file.keep(job.index, job.sample, _not_answered(task, job, reason))
    jobs = [job for job in jobs if asked[job.index].why_not is None]
    if not jobs:
        return
    answerer = _open(task, found, asking, file.settings["seed"])
    with Progress(len(asked) * task.samples, len(file.there)) as progress:

        def done(job: Job, completion: Completion) -> None:
            values = {
                "answer": completion.text,
                "finish_reason": completion.finish_reason,
                "prompt_tokens": len(job.ids),
                "answer_tokens": len(completion.token_ids),
                "model": task.model,
            }
            file.keep(job.index, job.sample, values)
            progress.advance(len(completion.token_ids))

        fitting = []
        for job in jobs:
            if (reason := answerer.why_not(job.ids)) is None:
                fitting.append(job)
            else:
                file.keep(job.index, job.sample, _not_answered(task, job, f"the prompt {reason}"))
                progress.advance(0)
        for start in range(0, len(fitting), AT_ONCE):
            answerer.answer(fitting[start : start + AT_ONCE], done)


def _jobs(asked: Sequence[Question], samples: int) -> list[Job]:
    seen: Counter[bytes] = Counter()
    jobs = []
    for index, question in enumerate(asked):
        earlier = seen[question.ids.tobytes()]
        seen[question.ids.tobytes()] += 1
        # Stays what it is if more samples are asked for later.
        jobs += [Job(index, n, question.ids, 1 + n + 1_000_000 * earlier) for n in range(samples)]
    return jobs


def _not_answered(task: Task, job: Job, reason: str) -> dict[str, Any]:
    return {
        "answer": None,
        "finish_reason": None,
        "skipped": reason,
        "prompt_tokens": len(job.ids),
        "answer_tokens": 0,
        "model": task.model,
    }


def _open(task: Task, found: Found, asking: Asking, seed: int) -> Answerer:
    if task.engine == "vllm":
        from luthier.generate.vllm import Vllm

        return Vllm(found, asking, task.sampling, seed)
    from luthier.generate.asking import open_engine

    engine, _ = open_engine(task.model, raw=task.place.raw)
    return Ours(engine, task.sampling, seed)


class Ours:
    """Our own engine, in batches that memory holds."""

    def __init__(self, engine: Engine, sampling: Sampling, seed: int) -> None:
        self.engine, self.sampling, self.seed = engine, sampling, seed

    def why_not(self, prompt_ids: Sequence[int]) -> str | None:
        return self.engine.why_not(prompt_ids)

    def answer(self, jobs: Sequence[Job], on_done: Callable[[Job, Completion], None]) -> None:
        """RunError: memory does not hold a single prompt with its answer."""
        from luthier.generate.batches import in_batches
        from luthier.generate.engine import evaluating

        done: set[int] = set()

        def ask(waiting: list[int]) -> None:
            rows = self.engine.rows([jobs[place].ids for place in waiting], self.sampling)
            for row, place in zip(rows, waiting, strict=True):
                row.index, row.draws = place, random_stream(self.seed, jobs[place].number, row.prompt_ids)
            loop = self.engine.loop()
            # The longest prompt first: what is too large for the memory fails at once.
            loop.submit(sorted(rows, key=lambda row: -len(row.prompt_ids)))
            with evaluating(self.engine.model):
                while stepped := loop.step():
                    for row in stepped:
                        if row.done:
                            on_done(jobs[row.index], row.completion(self.engine.tokenizer))
                            done.add(row.index)

        advice = "--max-new-tokens bounds the answer"
        in_batches(self.engine, [job.ids for job in jobs], done.__contains__, ask, advice)


def _say(file: AnswerFile, rows: int, samples: int) -> None:
    answered = len(file.there) - file.skipped
    cut = f", {file.cut} of them cut off (see --max-new-tokens)" if file.cut else ""
    log.info("%s: %d answers to %d rows%s", file.path, answered, rows, cut)
    if file.skipped:
        reasons = Counter(row["skipped"] for row in file.lines() if row.get("skipped"))
        most = "; ".join(f"{reason} ({count})" for reason, count in reasons.most_common(3))
        log.warning("%d of %d answers there are not: %s", file.skipped, rows * samples, most)
    if not answered:
        raise DataError(f"{file.path}: not a single row could be answered, and its lines say why")
