"""Chat templates by name, for models that bring none or are to be trained on another.

Each file beside this one is a Jinja template in the dialect of transformers (`messages`, `tools`,
`add_generation_prompt`, `bos_token`, `eos_token`; `{% generation %}` around what the model writes). They lay
out conversations as the model families were trained, and never rewrite earlier turns, except where the family
does.
"""

from __future__ import annotations

import difflib
from functools import cache
from pathlib import Path

from luthier.errors import ConfigError

_FOLDER = Path(__file__).parent

_ALIASES = {
    "gemma2": "gemma",
    "gemma3": "gemma",
    "mistral": "mistral_v2v3",
    "mistral_tekken": "mistral_v3_tekken",
    "phi": "phi_3",
    "phi_35": "phi_3",
    "phi3": "phi_3",
    "phi4": "phi_4",
    "qwen": "qwen_25",
    "qwen2": "qwen_25",
    "qwen25": "qwen_25",
    "qwen_3": "qwen3",
    "deepseek": "deepseek_v3",
    "llama_2": "llama2",
    "llama_3": "llama3",
}
"""Other names under which a template is known."""


@cache
def names() -> tuple[str, ...]:
    """Every name that `chat_template` takes, aliases among them."""
    return tuple(sorted({path.stem for path in _FOLDER.glob("*.jinja")} | set(_ALIASES)))


def named(name: str) -> str:
    """Text of a template. Raises KeyError for a name that is not in `names()`."""
    path = _FOLDER / f"{_ALIASES.get(name, name)}.jinja"
    if name not in names():
        raise KeyError(name)
    return path.read_text(encoding="utf-8").removesuffix("\n")


def chosen(
    choice: str | None, jinja: str | None, own: str | dict[str, str] | None
) -> str | dict[str, str] | None:
    """The template that a config asks for; None where it asks for the model's own and there is none.

    Args:
        choice: a value of `chat_template`: None, `tokenizer_default`, `tokenizer_default_fallback_NAME`,
            `jinja`, a name, or a path.
        jinja: a value of `chat_template_jinja`, text or path.
        own: the template that came with the tokenizer.

    Raises:
        ConfigError: no such name or file, or the two keys contradict each other.
    """
    if jinja is not None and choice not in (None, "jinja"):
        raise ConfigError(f"chat_template is {choice!r} and chat_template_jinja is set too; keep one of them")
    if choice == "jinja" and jinja is None:
        raise ConfigError(
            "chat_template: jinja goes with chat_template_jinja: the template's text, or a file's path"
        )
    if jinja is not None:
        return _read(jinja, "chat_template_jinja") if _is_path(jinja) else jinja
    if choice is None or choice == "tokenizer_default":
        return own
    if choice.startswith("tokenizer_default_fallback_"):
        return own or chosen(choice.removeprefix("tokenizer_default_fallback_"), None, own)
    if isinstance(own, dict) and choice in own:
        return own[choice]
    if choice in names():
        return named(choice)
    if _is_path(choice):
        return _read(choice, "chat_template")
    if "{{" in choice or "{%" in choice:
        return choice
    close = difflib.get_close_matches(choice, names(), n=1)
    meant = f" Did you mean {close[0]!r}?" if close else ""
    raise ConfigError(
        f"chat_template: there is no template named {choice!r}.{meant} Names: tokenizer_default (the model's "
        f"own), {', '.join(names())}; or the path of a .jinja file."
    )


def _is_path(text: str) -> bool:
    if "\n" in text or "{%" in text or "{{" in text:
        return False
    return text.endswith((".jinja", ".jinja2", ".j2", ".txt")) or "/" in text or Path(text).is_file()


def _read(path: str, key: str) -> str:
    try:
        return Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{key}: cannot read {path}: {error}") from error
