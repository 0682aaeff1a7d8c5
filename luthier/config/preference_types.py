"""The types of rows that preference tuning reads, as a table: which columns, and how their turns are written.

A type says where a row has its prompt and its answers, and what becomes of them: turns of the chat template, turns
written out in ChatML or in Llama 3's form, or text as it is. The names and columns are Axolotl's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from luthier.config.datasets import DatasetEntry, UserPreference

PAIR_FIELDS = ("field_chosen", "field_rejected")
LABEL_FIELDS = ("field_completion", "field_label")
PAIR_FORMATS = ("chosen_format", "rejected_format")
FORMATS = ("prompt_format", *PAIR_FORMATS, "completion_format")
MESSAGE_KEYS = ("message_property_mappings", "message_field_role", "message_field_content", "roles")


@dataclass(frozen=True, slots=True)
class Turns:
    """How the turns of a conversation are written out; `end` is what the model writes behind its answer."""

    turn: str
    header: str
    end: str
    always_system: bool = False

    def prompt(self, messages: list[tuple[str, str]]) -> str:
        """Pairs of role and content, and the header of the answer."""
        if self.always_system and (not messages or messages[0][0] != "system"):
            messages = [("system", ""), *messages]
        turns = [self.turn.format(role=role, content=content) for role, content in messages]
        return "".join(turns) + self.header

    @property
    def frame(self) -> str:
        """All that is written around the contents."""
        return self.turn + self.header + self.end


CHATML = Turns("<|im_start|>{role}\n{content}<|im_end|>\n", "<|im_start|>assistant\n", "<|im_end|>")
LLAMA3 = Turns(
    "<|start_header_id|>{role}<|end_header_id|>\n\n{content}<|eot_id|>",
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "<|eot_id|>",
)
ZEPHYR = Turns("<|{role}|>\n{content}</s>\n", "<|assistant|>\n", "", always_system=True)


@dataclass(frozen=True, slots=True)
class PreferenceType:
    """Columns of a row; of several names the first that a row has is taken.

    Attributes:
        form: `template` (the chat template), `text`, `turns`, or `any`: as the row is.
        prompt: none where the prompt is the beginning of the answers, which are whole conversations.
        ranked: column of a list of answers, each with its rank, in place of a chosen and a rejected one.
    """

    form: str
    prompt: tuple[str, ...] = ("prompt",)
    optional_prompt: bool = False
    chosen: tuple[str, ...] = ("chosen",)
    rejected: tuple[str, ...] = ("rejected",)
    turns: Turns | None = None
    ranked: str = ""


_ARGILLA = PreferenceType(
    "turns",
    ("prompt", "input", "question", "instruction"),
    chosen=("chosen", "chosen_response"),
    rejected=("rejected", "rejected_response"),
)
_IN_TURNS = {
    "default": _ARGILLA,
    "argilla": _ARGILLA,
    "argilla_chat": PreferenceType("turns", ()),
    "icr": PreferenceType("turns", ("input",)),
    "intel": PreferenceType("turns", ("question",)),
    "prompt_pairs": PreferenceType("turns"),
    "ultra": PreferenceType("turns"),
}
UNTYPED = PreferenceType("any", optional_prompt=True)
USER_DEFINED = PreferenceType("text")
PREFERENCE_TYPES: dict[str, PreferenceType] = {
    "chat_template.default": PreferenceType("template", ("messages", "conversations")),
    "chat_template.argilla": PreferenceType("template", optional_prompt=True),
    "chat_template.argilla_chat": PreferenceType("template", ()),
    **{f"chatml.{name}": replace(kind, turns=CHATML) for name, kind in _IN_TURNS.items()},
    **{f"llama3.{name}": replace(kind, turns=LLAMA3) for name, kind in _IN_TURNS.items()},
    # A style alone is its default.
    "chatml": replace(_ARGILLA, turns=CHATML),
    "llama3": replace(_ARGILLA, turns=LLAMA3),
    "zephyr.nectar": PreferenceType("turns", turns=ZEPHYR, ranked="answers"),
    "user_defined.default": USER_DEFINED,
    "passthrough.default": UNTYPED,
}
"""By the name that stands in `type`."""


def preference_type(entry: DatasetEntry) -> PreferenceType | None:
    """What a row of the entry is in a preference run; None for a type that such a run has not."""
    if entry.type is None:
        return UNTYPED
    if isinstance(entry.type, UserPreference):
        return USER_DEFINED
    return PREFERENCE_TYPES.get(entry.type) if isinstance(entry.type, str) else None


def is_preference(entry: DatasetEntry) -> bool:
    """Whether the entry's type is one of preference runs only."""
    return entry.type is not None and preference_type(entry) is not None


def setting(entry: DatasetEntry, name: str) -> str | None:
    """A key that stands in `type` or beside it."""
    inside = getattr(entry.type, name, None) if isinstance(entry.type, UserPreference) else None
    return inside or getattr(entry, name)


def keys_read(entry: DatasetEntry, rl: str) -> frozenset[str]:
    """The entry's own keys that mean something for its type and method."""
    kind = preference_type(entry)
    assert kind is not None
    keys = {"field_system"}
    if not kind.ranked:
        keys.update(PAIR_FIELDS)
    if kind.prompt and kind is not PREFERENCE_TYPES["chat_template.default"]:
        keys.add("field_prompt")
    if kind.form in ("template", "any"):
        keys |= {"chat_template", "field_tools"}
    if kind.form != "text" and not kind.ranked:
        keys.update(MESSAGE_KEYS)
    if kind is PREFERENCE_TYPES["chat_template.default"]:
        keys.add("field_messages")
    if entry.type == "user_defined.default":
        keys |= {"prompt_format", *PAIR_FORMATS}
    if rl == "orpo":
        keys.add("train_on_inputs")
    if rl == "kto" and not kind.ranked:
        keys.update(LABEL_FIELDS)
        if entry.type == "user_defined.default":
            keys.add("completion_format")
    return frozenset(keys)
