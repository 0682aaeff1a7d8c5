"""The disk that a format needs, said before anything is written, and refused where it is not there."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from luthier.errors import RunError

log = logging.getLogger("luthier")

# Tokenizer, config and the like, and what the file system itself takes.
_BESIDE = 32 << 20


def claim_room(size: int, target: Path, *, besides: str = "", smaller: str = "") -> None:
    """Say what will be written, and what is free there.

    Args:
        size: bytes, at the moment when there is most. target: file or folder that will be made.
        besides: what the size has in it besides the result, in words. smaller: what would need less.

    Raises:
        RunError: it does not fit.
    """
    place = target.expanduser().absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    what = f"{in_words(size)}{f' ({besides})' if besides else ''}"
    if size + _BESIDE > free:
        hint = "make room, or choose another place with --output" + (f", or {smaller}" if smaller else "")
        raise RunError(f"{target} needs {what} of disk, and {in_words(free)} are free there; {hint}")
    log.info("needs %s of disk; %s are free", what, in_words(free))


def in_words(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
