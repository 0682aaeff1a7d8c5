"""What `luthier prepare logs` is asked for, and the bounds of what it holds."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from typing import Any

BLOCK = 1 << 18
"""Bytes that are read, decompressed and decoded at once."""
CHECKPOINT = 64 << 20
"""Bytes of input between two notes of how far it went; a place, not a time, so that every run has the same ones."""
MAX_RECORD_LINES = 500
"""Lines of a record; what is longer goes on as the next record."""
MAX_RECORD_CHARACTERS = 65536
MEMO_BYTES = 16 << 20
"""Of each of the two tables that remember what was found out about a text; emptied when full, and at each note."""
TEMPLATE_BYTES = 32 << 20
"""Of all templates; then no more are made."""
SEEN_SLOTS = 1 << 23
"""Places for records that are remembered for de-duplication, 8 bytes each: 64 MiB."""
MAX_SESSIONS = 20_000
"""Sessions (of `anomaly`) that are open at once; the one that was silent longest is closed first."""
MAX_SESSION_CHARACTERS = 16384
MAX_OPEN_CHARACTERS = 16 << 20
"""Of all open sessions together, with 100 more a record."""

TASKS = ("completion", "severity", "template", "next-line", "summarise", "anomaly")
INSTRUCTIONS = TASKS[1:]


@dataclass(frozen=True)
class Settings:
    """One preparation; each field is the option of its name.

    Attributes:
        max_tokens: of a row, with what training puts around it.
        overlap: records that a chunk repeats of the one before.
        overlap_tokens: if not 0, as many whole records as fit into so many tokens instead.
        keep_per_template: 0: all are kept.
        validation_share: the last part of each source.
        labels: a CSV file of session keys and labels.
        label_columns: the names of these two, with a comma between.
        limit: records, 0: all.
    """

    tasks: tuple[str, ...] = ("completion",)
    max_tokens: int = 2048
    overlap: int = 2
    overlap_tokens: int = 0
    tokenizer: str | None = None
    keep_per_template: int = 100
    max_templates: int = 10_000
    similarity: float = 0.5
    dedup: bool = True
    masks: tuple[str, ...] = ()
    mask_patterns: tuple[tuple[str, str], ...] = ()
    pseudonyms: str | None = None
    record_start: str | None = None
    max_line_bytes: int = 65536
    encoding: str | None = None
    labels: str | None = None
    label_key: str | None = None
    label_columns: str | None = None
    context: int = 10
    limit: int = 0
    validation: str | None = None
    validation_share: float = 0.1
    storage: dict[str, Any] = field(default_factory=dict)

    def fingerprint(self) -> str:
        """The same for settings that give the same rows."""
        told = {name: value for name, value in asdict(self).items() if name != "storage"}
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
