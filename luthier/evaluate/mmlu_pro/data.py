"""MMLU-Pro's questions, its prompts, and how an answer is read out of what a model wrote.

Up to ten options make guessing worthless, and most questions need working out: so a model sees five worked examples of
the subject and then reasons before it names a letter (Wang et al. 2024, arXiv:2406.01574). Everything here follows the
scripts that the benchmark is published with (TIGER-AI-Lab/MMLU-Pro, `evaluate_from_local.py`), to the letter of the
prompt, because a figure can only be set beside published ones if it was measured in the same way.
"""

from __future__ import annotations

import glob
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from luthier.config.datasets import DatasetEntry
from luthier.data.files import KINDS, Row, kind_of, read_file
from luthier.data.readers import open_rows
from luthier.errors import ConfigError, DataError

HUB_ID = "TIGER-Lab/MMLU-Pro"
LETTERS = "ABCDEFGHIJKLMNOP"
NOT_AN_OPTION = "N/A"
STOP = "Question:"  # what a base model writes when it goes on to a question of its own
GUESS_SEED = 12345

_TEST, _VALIDATION = "test", "validation"
_SPLIT_WORDS = {"test": _TEST, "validation": _VALIDATION, "valid": _VALIDATION, "val": _VALIDATION, "dev": _VALIDATION}

_HEAD = (
    "The following are multiple choice questions (with answers) about {subject}. Think step by step and then finish "
    'your answer with "the answer is (X)" where X is the correct letter choice.\n\n\n\n'
)
_LETTER_HEAD = "The following are multiple choice questions (with answers) about {subject}.\n\n"
_THINK = "Answer: Let's think step by step."

# The three places in which an answer is looked for; the first that has one decides.
_SAID = re.compile(r"answer is \(?([A-J])\)?")
_LABELLED = re.compile(r".*[aA]nswer:\s*([A-J])")
_ALONE = re.compile(r"\b[A-J]\b")


@dataclass(frozen=True)
class Question:
    """One question; `options` without those that are none, `reasoning` of worked examples only."""

    id: str
    category: str
    text: str
    options: tuple[str, ...]
    answer: str
    answer_index: int
    reasoning: str = ""


@dataclass(frozen=True)
class Benchmark:
    """Questions by category, in the order in which the categories and questions stand in the data."""

    source: str
    test: Mapping[str, Sequence[Question]]
    validation: Mapping[str, Sequence[Question]]


# --- the data -----------------------------------------------------------------------------------------------


def load_benchmark(data: str | Sequence[str] | None, shots: int) -> Benchmark:
    """Test and validation questions from a folder, a file, a pattern, or the hub.

    Args:
        data: a folder or a pattern whose files say in their names which split they hold; a test file, with its
            validation file beside it; a hub id; or several files. None: the benchmark on the hub. shots: 0 needs no
            validation split.

    Raises:
        DataError: no such data, a split that is not there, a row that is not a question.
    """
    source = data if isinstance(data, str) else ", ".join(data or [HUB_ID])
    files = _local_files(source) if data is None or isinstance(data, str) else _named_files(data)
    if files is None:
        splits = {split: _hub_rows(source, split) for split in (_TEST, _VALIDATION) if split == _TEST or shots}
    else:
        splits = {_TEST: _file_rows(_files_of(files, _TEST, source))}
        if shots:
            splits[_VALIDATION] = _file_rows(_files_of(files, _VALIDATION, source))
    found = {split: _by_category(rows, worked=split == _VALIDATION) for split, rows in splits.items()}
    if not found[_TEST]:
        raise DataError(f"{source}: the test split holds no question.")
    return Benchmark(source, found[_TEST], found.get(_VALIDATION, {}))


def choose_subjects(asked: str, benchmark: Benchmark) -> list[str]:
    """The categories that a comma-separated list names, `all` for each of them; sorted, as they are worked through.

    Raises:
        ConfigError: a subject that is not there; the message lists those that are.
    """
    there = {_plain(name): name for name in benchmark.test}
    names = [name for name in asked.split(",") if name.strip()]
    if [_plain(name) for name in names] == ["all"]:
        return sorted(benchmark.test)
    unknown = [name.strip() for name in names if _plain(name) not in there]
    if unknown or not names:
        raise ConfigError(
            f"--subjects: {', '.join(unknown) or 'none is named'}: no such subject in {benchmark.source}. There are: "
            f"all, or any of {', '.join(sorted(benchmark.test))} (separated by commas)"
        )
    return sorted({there[_plain(name)] for name in names})


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]+", " ", name.strip().lower())


def _local_files(source: str) -> list[Path] | None:
    """Data files that a path means, None where it can only be a hub id. A file stands for its folder's others too."""
    path = Path(source).expanduser()
    if path.is_file():
        split = _split_of(path)
        if split != _TEST:
            raise DataError(
                f"{path}: the file's name has to say that it holds the test split (like mmlu_pro_test.jsonl)"
                + (f", and this one says `{split}`. Name the test file" if split else "")
                + ", or the folder of both splits."
            )
        pattern = re.sub("test", "*", glob.escape(path.name), count=1, flags=re.IGNORECASE)
        beside = [other for other in sorted(path.parent.glob(pattern)) if _split_of(other) == _VALIDATION]
        return [path, *beside]
    if path.is_dir():
        files = [file for file in sorted(path.rglob("*")) if file.is_file() and kind_of(file)]
        if not files:
            raise DataError(f"{path}: no data files in this folder (known endings: {', '.join(sorted(KINDS))}).")
        return files
    if glob.has_magic(source):
        files = [Path(name) for name in sorted(glob.glob(str(path), recursive=True)) if kind_of(Path(name))]
        if not files:
            raise DataError(f"{source}: no data file matches this pattern; looked from {Path().resolve()}.")
        return files
    return None


def _named_files(names: Sequence[str]) -> list[Path]:
    """Several files that were named one by one, as a shell does with a pattern."""
    files = [Path(name).expanduser() for name in names]
    for path in files:
        if not path.is_file() or kind_of(path) is None:
            what = "there is no such file" if not path.is_file() else "it is no data file"
            raise DataError(f"{path}: {what} (of several --data of a benchmark, each is a file of one of its splits).")
    return files


def _split_of(path: Path) -> str | None:
    words = re.split(r"[^a-z]+", path.name.lower())
    return next((_SPLIT_WORDS[word] for word in words if word in _SPLIT_WORDS), None)


def _files_of(files: Sequence[Path], split: str, source: str) -> list[Path]:
    """The files of a split; where a folder holds other data as well, those that are named after the benchmark."""
    found = [path for path in files if _split_of(path) == split]
    named = [path for path in found if re.search(r"mmlu[^a-z]?pro", str(path.name).lower())]
    found = named or found
    if not found:
        names = ", ".join(path.name for path in files[:8])
        why = "the worked examples of the prompts come from it; --shots 0 asks without any" if split != _TEST else ""
        raise DataError(
            f"{source}: there is no file of the {split} split (no name with `{split}` in it)"
            + (f": {why}" if why else "")
            + f". There is: {names}."
        )
    if len({(path.parent, re.sub(r"\d+", "", path.name)) for path in found}) > 1:
        raise DataError(
            f"{source}: more than one file could be the {split} split: {', '.join(map(str, found[:5]))}. "
            "Name the test file itself."
        )
    return found


def _file_rows(paths: Sequence[Path]) -> Iterator[tuple[str, Row]]:
    for path in paths:
        for number, row in read_file(path, kind_of(path) or "json"):
            if isinstance(row, DataError):
                raise DataError(f"{path}:{number}: {row}.")
            yield f"{path}:{number}", row


def _hub_rows(name: str, split: str) -> Iterator[tuple[str, Row]]:
    return iter(open_rows(DatasetEntry(path=name, split=split)))


def _by_category(rows: Iterator[tuple[str, Row]], *, worked: bool) -> dict[str, list[Question]]:
    found: dict[str, list[Question]] = {}
    for place, row in rows:
        question = _question(row, place, worked)
        found.setdefault(question.category, []).append(question)
    return found


def _question(row: Row, place: str, worked: bool) -> Question:
    needed = ["question", "options", "answer", "category"] + (["cot_content"] if worked else [])
    missing = [name for name in needed if row.get(name) in (None, "")]
    if missing:
        raise DataError(f"{place}: not a question of MMLU-Pro: {', '.join(missing)} missing. It has {', '.join(row)}.")
    options, answer = row["options"], str(row["answer"])
    if not isinstance(options, list) or not all(isinstance(option, str) for option in options):
        raise DataError(f"{place}: `options` has to be a list of texts.")
    options = tuple(option for option in options if option != NOT_AN_OPTION)
    if not 1 <= len(options) <= len(LETTERS):
        raise DataError(f"{place}: {len(options)} options; there have to be 1 to {len(LETTERS)}.")
    if len(answer) != 1 or answer not in LETTERS:
        raise DataError(f"{place}: `answer` has to be a letter from A on, not {answer!r}.")
    index = LETTERS.index(answer)
    if row.get("answer_index", index) != index:
        raise DataError(f"{place}: `answer` is {answer} and `answer_index` {row['answer_index']}: they contradict.")
    return Question(
        id=str(row.get("question_id", place)),
        category=str(row["category"]),
        text=str(row["question"]),
        options=options,
        answer=answer,
        answer_index=index,
        reasoning=str(row["cot_content"]) if worked else "",
    )


# --- prompts ------------------------------------------------------------------------------------------------


def cot_prompt(question: Question, examples: Sequence[Question]) -> str:
    """The published prompt: the task, worked examples, and the question with the beginning of an answer."""
    parts = [_HEAD.format(subject=question.category)]
    for example in examples:
        reasoning = example.reasoning.replace("A: Let's think step by step.", _THINK)
        parts.append(f"{_asked(example)}{reasoning}\n\n")
    return "".join(parts) + _asked(question) + _THINK


def letter_prompt(question: Question, examples: Sequence[Question]) -> str:
    """The prompt of the quick mode: examples without their reasoning, and `Answer:`, which a letter follows."""
    parts = [_LETTER_HEAD.format(subject=question.category)]
    parts += [f"{_asked(example)}Answer: {example.answer}\n\n" for example in examples]
    return "".join(parts) + _asked(question) + "Answer:"


def _asked(question: Question) -> str:
    options = "".join(f"{letter}. {text}\n" for letter, text in zip(LETTERS, question.options, strict=False))
    return f"Question:\n{question.text}\nOptions:\n{options}"


# --- answers ------------------------------------------------------------------------------------------------


def extract_answer(text: str) -> tuple[str | None, int]:
    """The letter that an output names, and the stage that found it: 1, 2, 3, or 0 where there is none.

    First "answer is (X)", then "Answer: X", then the last capital from A to J that stands alone. Within the first two
    stages the first match counts; within a line, the second one takes the last.
    """
    if said := _SAID.search(text):
        return said[1], 1
    if labelled := _LABELLED.search(text):
        return labelled[1], 2
    alone = _ALONE.findall(text)
    return (alone[-1], 3) if alone else (None, 0)


def guessed_index(options: int) -> int:
    """The option that `evaluate_from_local.py` takes where there is no answer. It seeds the generator anew for every
    question, so this depends on nothing but the number of options."""
    return random.Random(GUESS_SEED).randint(0, options - 1)


def guessed_letter() -> str:
    """The letter that `compute_accuracy.py` takes there: always this one of ten."""
    return random.Random(GUESS_SEED).choice(LETTERS[:10])
