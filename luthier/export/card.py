"""The model card as the hub reads it: what a run wrote about itself, with the names that hold where it is published.

The body stays the run's (or whatever its author made of it). Replaced are the title, how to load it, and the sentence
about files that are not published; front matter that somebody added stays.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from luthier.errors import RunError

_FRONT = re.compile(r"\A---\s*\n(.*?)\n---\s*\n", re.DOTALL)
_USAGE = re.compile(r"^## How to use it\n(.*?)(?=^## |\Z)", re.DOTALL | re.MULTILINE)
_UNPUBLISHED = re.compile(r"^All settings, with where each came from, .*?$\n?", re.MULTILINE)
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


@dataclass(frozen=True)
class Subject:
    """What a card is about.

    Attributes:
        repo: owner/name. is_adapter: an adapter, else a whole model. base: the base's id on the hub, if it has one.
        base_name: what the base is called in any case. revision: a branch, where it is not the repository's main one.
        gguf: names of GGUF files. settings: whether config.yaml is published. licence: the hub's name for it.
        plot: whether loss.png is published.
    """

    repo: str
    is_adapter: bool
    base: str | None
    base_name: str | None
    revision: str | None = None
    gguf: Sequence[str] = ()
    settings: bool = False
    licence: str | None = None
    plot: bool = False


def make_card(text: str | None, subject: Subject) -> str:
    """A card for the hub from a folder's own, or a short one where it has none.

    Raises:
        RunError: the front matter of the folder's card is no YAML mapping.
    """
    front, body = _split(text or "")
    front = _front_matter(front, subject)
    body = _body(body, subject) if body.strip() else _short(subject)
    shown = yaml.safe_dump(front, sort_keys=False, allow_unicode=True, width=1000)
    return f"---\n{shown}---\n\n{body.strip()}\n"


def licence_of(card: str) -> str | None:
    """The licence that a card names."""
    found = _split(card)[0].get("license")
    return found if isinstance(found, str) else None


def is_hub_id(name: str) -> bool:
    """Whether a name has the form of an id on the hub."""
    return _HUB_ID.fullmatch(name) is not None


def _split(text: str) -> tuple[dict[str, Any], str]:
    found = _FRONT.match(text)
    if found is None:
        return {}, text
    try:
        front = yaml.safe_load(found[1]) or {}
    except yaml.YAMLError as error:
        raise RunError(f"README.md: its front matter is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(front, dict):
        raise RunError("README.md: its front matter is no mapping of keys to values")
    return front, text[found.end() :]


def _front_matter(front: dict[str, Any], subject: Subject) -> dict[str, Any]:
    tags = front.get("tags") or []
    tags = [tags] if isinstance(tags, str) else list(tags)
    wanted = ["luthier", *(["lora"] if subject.is_adapter else []), *(["gguf"] if subject.gguf else [])]
    named = {
        "base_model": subject.base,
        "library_name": "peft" if subject.is_adapter else "transformers",
        "pipeline_tag": front.get("pipeline_tag") or "text-generation",
        "license": subject.licence or front.get("license"),
        "tags": [*tags, *(tag for tag in wanted if tag not in tags)],
    }
    rest = {key: value for key, value in front.items() if key not in named}
    return {key: value for key, value in named.items() if value} | rest


def _body(body: str, subject: Subject) -> str:
    body = re.sub(r"^# .*$", lambda _: f"# {subject.repo.split('/')[1]}", body, count=1, flags=re.MULTILINE)
    if not subject.is_adapter:
        body = body.replace("A LoRA adapter for ", "A LoRA adapter, merged into ", 1)
    if subject.base and subject.base_name:
        body = body.replace(f"{subject.base_name} (a local model)", subject.base)
    if not subject.plot:
        body = re.sub(r"^!\[[^\]]*\]\(loss\.png\)\n*", "", body, flags=re.MULTILINE)
    own = _USAGE.search(body)
    # The run's card says first what an adapter needs of its base, such as a scaled rotary embedding.
    condition = own[1].partition("With Luthier,")[0].strip() if own and subject.is_adapter else ""
    usage = f"## How to use it\n\n{condition}{chr(10) * 2 if condition else ''}{_usage(subject)}\n"
    body = _USAGE.sub(lambda _: usage, body, count=1) if own else f"{body.rstrip()}\n\n{usage}"
    last = "All settings are in `config.yaml`.\n" if subject.settings else ""
    return _UNPUBLISHED.sub(last, body)


def _short(subject: Subject) -> str:
    named = subject.base or (f"{subject.base_name} (a local model)" if subject.base_name else None)
    if subject.is_adapter:
        what = f"A LoRA adapter for {named}" if named else "A LoRA adapter"
    else:
        what = f"A fine-tuned version of {named}" if named else "A language model"
    title = subject.repo.split("/")[1]
    return f"# {title}\n\n{what}, published with Luthier.\n\n## How to use it\n\n{_usage(subject)}"


def _usage(subject: Subject) -> str:
    repo = subject.repo
    at = f', revision="{subject.revision}"' if subject.revision else ""
    parts = []
    if not subject.revision and (subject.base or not subject.is_adapter):
        parts.append(
            "With Luthier, which puts the prompt into the format of the training:\n\n"
            f'```bash\nluthier generate {repo} --prompt "..."\n```\n'
            if subject.settings
            else f'With Luthier:\n\n```bash\nluthier generate {repo} --prompt "..."\n```\n'
        )
    if not subject.is_adapter:
        load = f"""from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{repo}"{at})"""
    elif subject.base:
        load = f"""from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = AutoModelForCausalLM.from_pretrained("{subject.base}")
model = PeftModel.from_pretrained(base, "{repo}"{at})"""
    else:
        load = f"""from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = AutoModelForCausalLM.from_pretrained("path/to/{subject.base_name or 'the base model'}")
model = PeftModel.from_pretrained(base, "{repo}"{at})"""
    with_ = "PEFT" if subject.is_adapter else "transformers"
    parts.append(
        f"With {with_}:\n\n```python\n{load}\ntokenizer = AutoTokenizer.from_pretrained(\"{repo}\"{at})\n```\n"
    )
    if subject.gguf:
        files = ", ".join(f"`{name}`" for name in subject.gguf)
        parts.append(f"For llama.cpp and what is built on it: {files}.\n")
    return "\n".join(parts)
