"""Whether the data looks large enough, balanced and short enough. Each threshold stands in the sentence that it
decides."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from luthier.config import Config
from luthier.config.preference import unit_of
from luthier.data.inspect.collect import Collected, Record
from luthier.data.inspect.verdict import Level, Verdict, percent, share, worst

_FEW, _STYLE = 50, 1000
_ONE_SIDED = 0.9
_SAME_START = 0.25
_FEW_STEPS = 50
_MLP = ("gate_proj", "up_proj", "down_proj")


def large_enough(found: Collected, train: Sequence[Record]) -> Verdict:
    """Rows and trained tokens, against rules of thumb whose sources are named."""
    config = found.material.config
    rows = sum(count for count, (_, held) in zip(found.rows, found.material.entries, strict=True) if not held)
    tokens = sum(record.trained for record in train) * found.stride
    about = "" if found.material.tokenizer is not None and found.stride == 1 else "about "
    level: Level = "bad" if rows < _FEW else "look" if rows < _STYLE else "fine"
    unit = "rows" if config.preference.rl is None else f"rows ({unit_of(config.preference.rl)})"
    text = (
        f"{rows:,} {unit}, {about}{tokens:,} trained tokens. As a rule of thumb, bad below {_FEW} (OpenAI's guide to "
        f"fine-tuning sees clear gains from 50 to 100 examples on), worth a look below {_STYLE:,} (LIMA, Zhou "
        "et al. 2023: "
        "1,000 chosen examples teach style and format; new knowledge takes more)"
    )
    figures: dict[str, Any] = {"rows": rows, "trained_tokens": tokens, "estimated": bool(about)}
    more = []
    if found.material.is_config:
        training = config.training
        examples = training.micro_batch_size * training.gradient_accumulation_steps
        if not config.data.sample_packing:
            steps = training.max_steps or -(-len(train) * found.stride // examples) * training.num_epochs
            figures["steps"] = int(steps)
            more.append(f"about {int(steps):,} optimizer steps of {examples:,} examples on one process")
            if steps < _FEW_STEPS:
                level = worst([level, "look"])
                more[-1] += f", fewer than {_FEW_STEPS}: smaller gradient_accumulation_steps or more epochs make more"
        parameters = lora_parameters(config)
        if parameters:
            figures["trainable_parameters"] = parameters
            more.append(
                f"the adapter trains {parameters:,} numbers, {tokens / parameters:.2g} trained tokens for "
                "each; below 1 it "
                "can learn its rows by heart (a language model stores about 2 bits a parameter, Allen-Zhu & "
                "Li 2024): "
                "watch the validation loss"
                if tokens < parameters
                else f"the adapter trains {parameters:,} numbers, {tokens / parameters:.2g} trained tokens for each"
            )
    return Verdict("large enough", level, text, figures, more)


def lora_parameters(config: Config) -> int | None:
    """Numbers that LoRA trains, where the base is a folder with a config.json of Llama's shapes; else None."""
    adapter = config.adapter
    if adapter.adapter is None:
        return None
    try:
        shapes = json.loads((Path(config.model.base_model).expanduser() / "config.json").read_text("utf-8"))
        hidden, layers = shapes["hidden_size"], shapes["num_hidden_layers"]
        heads, inner = shapes["num_attention_heads"], shapes["intermediate_size"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    head = shapes.get("head_dim") or hidden // heads
    kv = shapes.get("num_key_value_heads") or heads
    sizes = {
        "q_proj": hidden + heads * head, "k_proj": hidden + kv * head, "v_proj": hidden + kv * head,
        "o_proj": heads * head + hidden, **dict.fromkeys(_MLP, hidden + inner),
    }  # fmt: skip
    named = adapter.lora_target_modules
    if not adapter.lora_target_linear and (not isinstance(named, list) or not set(named) <= set(sizes)):
        return None
    modules = sizes if adapter.lora_target_linear or not isinstance(named, list) else named
    if shapes.get("num_local_experts") or shapes.get("num_experts"):
        return None
    return int(adapter.lora_r * layers * sum(sizes[name] for name in modules))


def balanced(found: Collected, train: Sequence[Record]) -> Verdict:
    """Shares of datasets, categories, labels and beginnings, and how answers spread over lengths."""
    more: list[str] = []
    levels: list[Level] = ["fine"]
    figures: dict[str, Any] = {}
    entries = found.material.entries
    sources = Counter(record.source for record in train)
    if len(sources) > 1:
        most, count = sources.most_common(1)[0]
        figures["sources"] = {entries[source][0].path: number for source, number in sources.items()}
        one_sided = count > _ONE_SIDED * len(train)
        levels.append("look" if one_sided else "fine")
        more.append(
            f"datasets: {_counts({entries[s][0].path: n for s, n in sources.items()})}"
            + (f"; {entries[most][0].path} is more than {_ONE_SIDED:.0%} of the rows" if one_sided else "")
        )
    columns: dict[str, Counter[str]] = {}
    for record in train:
        for name, value in record.groups.items():
            columns.setdefault(name, Counter())[value] += 1
    for name, values in columns.items():
        # A category is in most rows, and each of its values in several; a number of its own for each row is none.
        if sum(values.values()) >= 0.8 * len(train) and 1 < len(values) <= min(50, len(train) / 5):
            figures.setdefault("columns", {})[name] = dict(values.most_common())
            one_sided = values.most_common(1)[0][1] > _ONE_SIDED * sum(values.values())
            levels.append("look" if one_sided else "fine")
            more.append(f"column `{name}`: {_counts(values)}" + (", one-sided" if one_sided else ""))
    labels = Counter(record.label for record in train if record.label is not None)
    if labels:
        weights = found.material.config.preference
        good = labels[True] * weights.kto_desirable_weight
        bad = labels[False] * weights.kto_undesirable_weight
        even = bad and 0.9 <= good / bad <= 1.5
        levels.append("fine" if even else "bad" if not good or not bad else "look")
        figures["labels"] = {"desirable": labels[True], "undesirable": labels[False]}
        more.append(
            f"labels: {labels[True]:,} desirable, {labels[False]:,} undesirable answers, "
            + (f"which weigh {good / bad:.2f}:1; " if bad else "")
            + "kto's authors keep that between 1:1 and 4:3 (Ethayarajh et al. 2024, section 4.2)"
        )
    given = [record.given for record in train if record.given is not None]
    if given:
        figures["empty_inputs"] = given.count(False)
        more.append(f"inputs: {share(given.count(False), len(given))} are empty")
    _beginnings(train, levels, more, figures)
    _short_answers(train, levels, more, figures)
    words = np.array([record.words for record in train if record.words])
    if len(words):
        low, middle, high = np.percentile(words, [10, 50, 90])
        names = ("p10", "p50", "p90", "most")
        figures["answer_words"] = dict(zip(names, map(float, (low, middle, high, words.max())), strict=True))
        more.append(f"answers: {middle:,.0f} words in the middle, a tenth below {low:,.0f}, a tenth above {high:,.0f}")
    sentence = {
        "fine": "nothing that was counted is one-sided",
        "look": "one-sided in places",
        "bad": "there is only one kind of label or of answer, and nothing to tell apart",
    }[worst(levels)]
    limits = (
        f"worth a look: a dataset, category or short answer with more than {_ONE_SIDED:.0%}, a beginning with "
        f"{_SAME_START:.0%}"
    )
    return Verdict("balanced", worst(levels), f"{sentence} ({limits})", figures, more)


def _beginnings(train: Sequence[Record], levels: list[Level], more: list[str], figures: dict[str, Any]) -> None:
    for name, words in (
        ("answers", [record.first_words for record in train]),
        ("prompts", [record.asking for record in train]),
    ):
        counted = Counter(word for word in words if word)
        if not counted or len(train) < 20:
            continue
        first, count = counted.most_common(1)[0]
        figures[f"most_common_beginning_of_{name}"] = [first, count]
        often = count >= _SAME_START * len(train)
        levels.append("look" if often and name == "answers" else "fine")
        more.append(
            f"{name} begin with {len(counted):,} different pairs of words, most often {first!r}: "
            f"{percent(count, len(train))}"
        )


def _short_answers(
    train: Sequence[Record], levels: list[Level], more: list[str], figures: dict[str, Any]
) -> None:
    """Answers that are one word or two in most rows, and few different ones: classes, which may be one-sided."""
    short = Counter(record.short for record in train if record.short)
    if len(train) < 20 or short.total() < 0.8 * len(train) or len(short) > min(50, len(train) / 5):
        return
    figures["short_answers"] = dict(short.most_common())
    one_sided = short.most_common(1)[0][1] > _ONE_SIDED * short.total()
    levels.append("bad" if len(short) == 1 and short.total() == len(train) else "look" if one_sided else "fine")
    more.append(f"answers of one word or two: {_counts(short)}" + (", one-sided" if one_sided else ""))


def _counts(values: Counter[str] | dict[str, int]) -> str:
    common = Counter(values).most_common()
    shown = ", ".join(f"{name or '(empty)'} {count:,}" for name, count in common[:6])
    return shown + (f", and {len(common) - 6} others down to {common[-1][1]:,}" if len(common) > 6 else "")


def short_enough(found: Collected, train: Sequence[Record]) -> Verdict:
    """Lengths against sequence_len, and what it would have to be."""
    data = found.material.config.data
    limit = data.sequence_len
    lengths = np.array([record.tokens for record in train if record.tokens])
    about = "" if found.material.tokenizer is not None else "about "
    if not len(lengths):
        return Verdict("too long", "bad", "no row has a token")
    over = int((lengths > limit).sum())
    splits = all(entry.type == "completion" for entry, held in found.material.entries if not held)
    fate = "split into further pieces" if splits else {
        "drop": "left out", "truncate": "cut", "raise": "an error"}[data.excess_length_strategy]  # fmt: skip
    level: Level = "fine" if splits or not over else "bad" if over > 0.05 * len(lengths) else "look"
    middle, most, nearly_all = (int(value) for value in np.percentile(lengths, [50, 95, 99], method="higher"))
    longest = max(train, key=lambda record: record.tokens)
    text = (
        f"{about}{share(over, len(lengths))} of rows are longer than sequence_len {limit:,} and would be "
        f"{fate}; bad from 5 % "
        "on"
    )
    more = [
        f"{about}{middle:,} tokens in the middle, {most:,} at 95 %, {nearly_all:,} at 99 %, {lengths.max():,} "
        "at most "
        f"({longest.place}); sequence_len {nearly_all:,} would keep 99 %"
    ]
    figures = {"over": over, "rows": len(lengths), "sequence_len": limit, "p50": middle, "p95": most, "p99": nearly_all,
               "longest": int(lengths.max()), "longest_at": longest.place, "estimated": bool(about)}  # fmt: skip
    if over:
        for record in train:
            if record.tokens > limit:
                record.problems.append(("too long", f"{about}{record.tokens:,} tokens"))
    return Verdict("too long", level, text, figures, more)
