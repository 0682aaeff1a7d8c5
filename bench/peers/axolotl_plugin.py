"""A plugin of Axolotl's that hands its trainer to whoever asked for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from axolotl.integrations.base import BasePlugin

on_trainer: Callable[[Any], None] = print


class Watch(BasePlugin):  # type: ignore[misc]
    """Calls `on_trainer` when the trainer exists."""

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        on_trainer(trainer)
