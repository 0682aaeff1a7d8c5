"""What a token looks like, by who gives it out: one table, for what is published and for what is trained on."""

from __future__ import annotations

TOKEN_SHAPES = (
    r"hf_[A-Za-z0-9]{16,}",
    r"sk-[A-Za-z0-9_-]{20,}",
    r"gh[pousr]_[A-Za-z0-9]{20,}",
    r"AKIA[0-9A-Z]{16}",
)
"""Regular expressions, each between word boundaries: Hugging Face, OpenAI and others, GitHub, Amazon."""
URL_LOGIN = r"(?<=://)[^\s/@:]+:[^\s/@]+(?=@)"
"""Name and password in a URL."""
