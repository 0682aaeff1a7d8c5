"""What can be wrong with one row, found in its texts.

Each check says what it saw and no more: a refusal may be meant, and an answer without a full stop may be code. How bad
a kind of problem is decides the order of the worst rows only.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from luthier.data.inspect.views import View, words_of


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of problem: how much it counts among the worst rows, and from which share of the rows on it is bad (None:
    it is only ever worth a look)."""

    weight: int
    bad_share: float | None
    what: str


KINDS: dict[str, Kind] = {
    "unreadable": Kind(10, 0.0, "rows that cannot be read, which stop a run unless `skip_bad_rows: true`"),
    "secret": Kind(9, 0.0, "rows with what looks like a key or a token"),
    "password": Kind(5, None, "rows with what looks like a password in code"),
    "empty answer": Kind(8, 0.01, "empty answers"),
    "same answers": Kind(8, 0.05, "pairs whose answers are the same, which are left out"),
    "encoding": Kind(7, 0.01, "texts damaged by a wrong encoding"),
    "control characters": Kind(6, 0.01, "texts with control characters"),
    "template tokens": Kind(6, 0.01, "texts with tokens of a chat template, such as </s>, inside"),
    "placeholder": Kind(5, 0.05, "texts with placeholders that were not filled in"),
    "repeats the prompt": Kind(4, 0.05, "answers that say the prompt again"),
    "repeats itself": Kind(4, 0.01, "answers that say the same over and over"),
    "no answer": Kind(4, 0.05, "answers that stand for none, such as N/A"),
    "refusal": Kind(3, None, "answers that look refused"),
    "cut off": Kind(2, None, "long answers that end without punctuation, in the middle of a sentence"),
    "line ends": Kind(2, None, "texts with carriage returns or U+2028, at which other programs break lines"),
    "no input": Kind(1, None, "inputs that only say that there is none"),
    "one word": Kind(1, None, "answers of one word"),
}

_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufeff\ufffe\uffff]")
_LINE_ENDS = re.compile("\r|\u2028|\u2029")
# UTF-8 that was read as Windows-1252 or Latin-1 (é becomes Ã©, ’ becomes â€™), and the sign for bytes that were none.
_MOJIBAKE = re.compile(
    "\ufffd|Ã[\u0080-\u00bf\u0152-\u017e\u0192\u02c6\u2013-\u2122€]|Â[\u0080-\u00bf]|â€[\u0080-\u00bf\u0152-\u0178\u2013-\u2122]"
    "|ðŸ[\u0080-\u00bf\u0152-\u0178\u2013-\u203a]|ï»¿|ï¿½"
)
_TEMPLATE = re.compile(
    r"<\|[\w ]{2,40}\|>|<｜[^｜<>]{2,40}｜>|</s>|<s>(?=\s*\[INST)|\[/?INST\]|<</?SYS>>|<(?:start|end)_of_turn>"
    r"|<(?:bos|eos|pad|unk)>"
    r"|^### (?:Instruction|Response|Input):\s*$|<end_of_utterance>",
    re.MULTILINE,
)
_PLACEHOLDER = re.compile(
    r"\{\{\s*\w+\s*\}\}|\[(?:insert|your|name|company|date|product)\b[^\]\n]{0,30}\]|\blorem ipsum\b|<\w+_HERE>",
    re.I,
)
_SECRET = re.compile(
    r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b|\bsk-(?:proj-|ant-)?[A-Za-z0-9_-]{20,}|\bgh[pousr]_[A-Za-z0-9]{30,}|\bhf_[A-Za-z0-9]{30,}"
    r"|\bxox[abprs]-[A-Za-z0-9-]{10,}|\bAIza[0-9A-Za-z_-]{35}|-----BEGIN (?:[A-Z]+ )?PRIVATE KEY-----"
    r"|\beyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,}"
)
_PASSWORD = re.compile(r"\b(?:password|passwd|api[_-]?key|secret)\s*[=:]\s*['\"][^\s'\"]{8,}['\"]", re.I)
_REFUSAL = re.compile(
    r"^\W*(?:(?:i['’]?m|i am) (?:very |so )?sorry,? but\b|sorry,? but i\b"
    r"|i (?:cannot|can['’]?t|am unable to|am not able to) (?:help|assist|provide|answer|do|comply|fulfill|generate"
    r"|access)\b"
    r"|as an? (?:ai|artificial intelligence|(?:large )?language model)\b[^.\n]{0,60}?"
    r"\b(?:not|cannot|can['’]?t|don['’]?t|unable)\b"
    r"|unfortunately,? i (?:cannot|can['’]?t|am (?:not|unable)))",
    re.I,
)
_NO_ANSWER = frozenset({"n/a", "na", "none", "null", "nan", "nil", "-", "--", "...", "todo", "tbd", "?", "no output",
                        "nooutput", "<nooutput>", "<no output>", "undefined"})  # fmt: skip
_NO_INPUT = frozenset({"no input", "noinput", "<no input>", "<noinput>", "n/a", "none", "no input required",
                       "no input needed", "not applicable", "null", "nan"})  # fmt: skip
_LONG_ANSWER = 25  # words from which an answer without an end looks cut off
_SAME_AGAIN = 8  # times that a run of six words may stand in an answer


def problems_of(view: View, special: Collection[str] = ()) -> Iterator[tuple[str, str]]:
    """(kind, detail) of what is wrong with a row; each kind once.

    Args:
        special: tokens that mean something to the tokenizer, beside the usual ones.
    """
    if view.opaque:
        return
    text = "\n".join((view.system, view.text))
    if match := _SECRET.search(text):
        yield "secret", f"begins {match[0][:4]!r}, {len(match[0])} characters"
    if match := _PASSWORD.search(text):
        yield "password", f"begins {match[0][:8]!r}"
    if match := _MOJIBAKE.search(text):
        yield "encoding", f"{_around(text, match)}"
    if match := _CONTROL.search(text):
        yield "control characters", f"U+{ord(match[0]):04X}"
    if match := _LINE_ENDS.search(text):
        yield "line ends", f"U+{ord(match[0]):04X}"
    found = _TEMPLATE.search(text)
    token = found[0] if found else next((token for token in special if token in text), None)
    if token is not None:
        yield "template tokens", repr(token)
    if match := _PLACEHOLDER.search(text):
        yield "placeholder", repr(match[0])
    if view.given is not None and view.given.strip().lower().rstrip(".") in _NO_INPUT:
        yield "no input", repr(view.given)
    yield from _of_answers(view)


def _of_answers(view: View) -> Iterator[tuple[str, str]]:
    names = ("chosen", "rejected") if view.pair else ("",) * len(view.answers)
    said: set[str] = set()
    for name, answer in zip(names, view.answers, strict=True):
        for kind, detail in _of_answer(answer, view):
            if kind not in said:
                said.add(kind)
                yield kind, f"{name}: {detail}".strip(": ") if name else detail
    if view.pair and view.answers[0].strip() == view.answers[1].strip():
        yield "same answers", ""


def _of_answer(answer: str, view: View) -> Iterator[tuple[str, str]]:
    stripped = answer.strip()
    if not stripped:
        yield "empty answer", "" if not answer else "only white space"
        return
    if stripped.lower() in _NO_ANSWER:
        yield "no answer", repr(stripped)
    prompt = view.prompt.strip()
    if len(prompt) >= 40 and (stripped.startswith(prompt) or (len(prompt) >= 80 and prompt in stripped)):
        yield "repeats the prompt", ""
    if _REFUSAL.search(stripped[:200]):
        yield "refusal", repr(stripped[:60])
    words = words_of(stripped) if len(stripped) < 100_000 else stripped[:100_000].lower().split()
    if len(words) <= 1 and not view.calls:
        yield "one word", repr(stripped[:40])
    if len(words) >= _LONG_ANSWER and _ends_in_a_sentence(stripped):
        yield "cut off", f"ends {stripped[-30:]!r}"
    if len(words) > 6 * _SAME_AGAIN:
        runs: dict[tuple[str, ...], int] = {}
        for at in range(len(words) - 5):
            run = tuple(words[at : at + 6])
            runs[run] = runs.get(run, 0) + 1
        most = max(runs, key=lambda run: runs[run])
        if runs[most] > _SAME_AGAIN:
            yield "repeats itself", f"{runs[most]} times {' '.join(most)!r}"


def _ends_in_a_sentence(text: str) -> bool:
    """Whether a text stops behind a comma or in a line of prose; a short last line is a list, a name or code."""
    last = text.rsplit("\n", 1)[-1]
    return text[-1] == "," or (text[-1].islower() and len(last.split()) >= 8)


def _around(text: str, match: re.Match[str]) -> str:
    return repr(text[max(0, match.start() - 12) : match.end() + 12])


def hidden(text: str) -> str:
    """A text with what looks like a secret masked, for showing."""
    masked = _SECRET.sub(lambda match: match[0][:4] + "*" * 8, text)
    return _PASSWORD.sub(lambda match: match[0][:8] + "*" * 8, masked)
