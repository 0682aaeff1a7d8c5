"""Unsloth's `train_on_responses_only` and `get_chat_template`.

Conversations are masked by what their template writes, as in any run. Rows of finished text have no roles: there the
answers are what stands between two texts that the notebook names, and a row becomes segments, of which these train.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from typing import Any

from luthier.api.rows import GivenRows, Kind, Row
from luthier.api.said import say_once
from luthier.api.trainers import SFTTrainer
from luthier.data import templates
from luthier.data.chat import ChatTemplate
from luthier.errors import ConfigError, DataError

log = logging.getLogger("luthier")

_LOOKED_AT = 100  # rows that are searched for the texts before a run
# Unsloth's names for templates that are called otherwise here.
_CALLED = {"llama": "llama2", "vicuna_old": "vicuna"}


def train_on_responses_only(
    trainer: SFTTrainer, instruction_part: str | None = None, response_part: str | None = None, **others: Any
) -> SFTTrainer:
    """Have a trainer train the answers of its rows, and nothing else of them.

    Args:
        instruction_part, response_part: the texts that open a question and an answer, for rows of finished text. What
            stands behind a response_part is trained up to the next instruction_part.

    Returns:
        The trainer itself.

    Raises:
        ConfigError, DataError: the rows have no answers that could be told from the rest.
    """
    for name, value in others.items():
        if name in ("last_response_only", "return_function") and value:
            raise ConfigError(f"train_on_responses_only: {name}={value!r} is not built here; leave it out")
        if value is not None:
            say_once(f"train_on_responses_only: {name} has no effect here: answers are found in the text itself")
    if not isinstance(trainer, SFTTrainer):
        raise ConfigError(f"train_on_responses_only: {type(trainer).__name__} trains answers only, by itself")

    def masked(rows: GivenRows) -> GivenRows:
        if rows.kind.entry.get("type") != "completion":
            if not rows.kind.entry:
                raise ConfigError("train_on_responses_only: rows of input_ids say by their labels what is trained")
            return replace(rows, kind=replace(rows.kind, train_on_inputs=False))
        if not instruction_part or not response_part:
            raise ConfigError(
                "train_on_responses_only: the rows are finished text: write instruction_part=... and "
                "response_part=..., the texts that open a question and an answer; or give the rows as `messages`"
            )
        if not any(response_part in str(row.get(_field(rows))) for row in islice(iter(rows), _LOOKED_AT)):
            raise DataError(
                f"train_on_responses_only: response_part={response_part!r} is in none of {rows.name}'s first rows: "
                "copy it from a row's text, with its line breaks"
            )
        convert = _in_segments(_field(rows), instruction_part, response_part, trainer.processing_class)
        return replace(rows, kind=Kind({"type": "input_output"}, rows.kind.columns, convert))

    trainer.change_rows(masked)
    return trainer


def _field(rows: GivenRows) -> str:
    return str(rows.kind.entry["field"])


def _in_segments(field: str, ask: str, reply: str, tokenizer: Any) -> Callable[[Row], Row]:
    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    adds_bos = bos is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]

    def convert(row: Row) -> Row:
        text = str(row.get(field) or "")
        # As a row of plain text would get them.
        if adds_bos and not text.startswith(bos):
            text = bos + text
        if eos is not None and not text.endswith(eos):
            text += eos
        segments: list[Row] = []
        at = 0
        while (found := text.find(reply, at)) >= 0:
            begin = found + len(reply)
            end = text.find(ask, begin)
            end = len(text) if end < 0 else end
            segments += [{"label": False, "text": text[at:begin]}, {"label": True, "text": text[begin:end]}]
            at = end
        segments.append({"label": False, "text": text[at:]})
        return {"segments": [segment for segment in segments if segment["text"]]}

    return convert


def get_chat_template(
    tokenizer: Any,
    chat_template: str | tuple[str, str] = "chatml",
    mapping: dict[str, str] | None = None,
    map_eos_token: bool = True,
    system_message: str | None = None,
) -> Any:
    """Give a tokenizer a chat template by its name.

    Args:
        chat_template: one of Luthier's names (dashes and dots as Unsloth writes them), the text of a template, or
            Unsloth's pair of that and the token that ends an answer. map_eos_token: that token becomes the EOS, where
            the tokenizer has it.

    Returns:
        The tokenizer itself.

    Raises:
        ConfigError: no such template, or something that it cannot do.
    """
    if mapping and any(key != value for key, value in mapping.items()):
        raise ConfigError(
            "get_chat_template: mapping: templates here read `role` and `content`. Leave it out: trainers read rows of "
            "`conversations` with from and value as they are, and messages with role and content go into "
            "tokenizer.apply_chat_template"
        )
    if system_message:
        raise ConfigError("get_chat_template: system_message: put it into the rows, as a message of the role system")
    name, end = (chat_template, None) if isinstance(chat_template, str) else chat_template
    if not isinstance(name, str):
        raise ConfigError("get_chat_template: chat_template: write a name, or the text of a template")
    is_text = "{%" in name or "{{" in name
    known = {re.sub(r"[-_. ]", "", each): each for each in templates.names()}
    plain = re.sub(r"[-_. ]", "", name.lower())
    called = _CALLED.get(name.lower().replace(" ", "_"), known.get(plain))
    if not is_text and called is None:
        raise ConfigError(
            f"get_chat_template: there is no template {name!r} here; there are {', '.join(templates.names())}. Most "
            "chat models bring their own: then leave get_chat_template out"
        )
    tokenizer.chat_template = name if is_text else templates.named(str(called))
    ends = [end] if isinstance(end, str) else ChatTemplate(tokenizer).habits.last_terminators
    if not ends:
        log.warning(
            "get_chat_template: %s ends an answer with no token of this tokenizer, so that generation would not stop "
            "there: take the template that belongs to the model",
            name if not is_text else "the template",
        )
    elif map_eos_token and tokenizer.eos_token not in ends and ends[0] in tokenizer.get_vocab():
        log.info("get_chat_template: EOS is %s now, which ends an answer in this template", ends[0])
        tokenizer.eos_token = ends[0]
    return tokenizer
