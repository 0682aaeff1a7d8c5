"""What every part of the config has in common."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A frozen group of keys. The string under each field is its help text wherever a user meets the key."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        # Field names such as `model_type` are the field's common ones; pydantic reserves `model_` by default.
        protected_namespaces=(),
    )
