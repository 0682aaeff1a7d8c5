"""What is to be published, without what is this machine's business: its paths, and secrets.

A path of this machine becomes its last name (a file of the hub's cache becomes the id that it was fetched by), in
values of JSON and YAML and in running text. What looks like a token, and what the environment keeps under a name like
`..._TOKEN` or `..._KEY`, becomes `***`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

from luthier.config.secrets import TOKEN_SHAPES, URL_LOGIN

# In the hub's cache: models--OWNER--NAME/snapshots/COMMIT.
_CACHED = re.compile(r"(?:models|datasets)--([\w.-]+?)(?:--([\w.-]+))?[\\/]snapshots[\\/][^\\/\s]+")
_PATH = re.compile(
    r"""(?:(?<![\w.:/<$~-])|(?<=file://))~?/[^\s"'`|<>()\[\]{},;]+"""  # in a URL or a closing tag something precedes
    r"""|(?<![\w])[A-Za-z]:\\[^\s"'`|<>]+"""
)
_TOKEN = re.compile(rf"\b(?:{'|'.join(TOKEN_SHAPES)})\b|{URL_LOGIN}")
_SECRET_NAMES = re.compile(r"(?:TOKEN|KEY|SECRET|PASSWORD)$", re.IGNORECASE)
_SHORTEST_SECRET = 12  # a shorter value of such a variable may be any word


class Scrub:
    """Attributes:
    paths: the paths that were replaced, each with what stands in its place. secrets: how many were found.
    """

    def __init__(self, secrets: Iterable[str | None] = ()) -> None:
        self.paths: dict[str, str] = {}
        self.secrets = 0
        known = {value for name, value in os.environ.items() if _SECRET_NAMES.search(name)} | set(secrets)
        self._known = sorted((s for s in known if s and len(s) >= _SHORTEST_SECRET), key=len, reverse=True)

    def value(self, value: Any) -> Any:
        """Plain data with every string in it looked at: one that is a path as a whole becomes its name."""
        if isinstance(value, dict):
            return {key: self.value(each) for key, each in value.items()}
        if isinstance(value, list):
            return [self.value(each) for each in value]
        if not isinstance(value, str):
            return value
        if is_local(value) and "\n" not in value:
            return self._named(value)
        return self.secret(value)

    def text(self, text: str) -> str:
        """Running text: a card, a page."""
        return _PATH.sub(lambda m: self._named(m[0]) if is_local(m[0]) else m[0], self.secret(text))

    def secret(self, text: str) -> str:
        """Text without tokens and keys; its paths stay."""
        for each in self._known:
            self.secrets += text.count(each)
            text = text.replace(each, "***")
        text, found = _TOKEN.subn("***", text)
        self.secrets += found
        return text

    def _named(self, path: str) -> str:
        self.paths[path] = public_name(path)
        return self.paths[path]


def public_name(path: str) -> str:
    """What a path of this machine is called elsewhere: its last name, or the hub's id of what the cache holds."""
    if found := _CACHED.search(path):
        return "/".join(part for part in found.groups() if part)
    return re.split(r"[\\/]+", path.rstrip("\\/"))[-1]


def is_local(text: str) -> bool:
    """Whether text is an absolute path, or one in the home folder, that can mean something here."""
    text = text.removeprefix("file://")
    if re.match(r"[A-Za-z]:\\\w", text):
        return True
    if text.startswith("~/") and len(text) > 2:
        return True
    first, _, rest = text[1:].partition("/")
    return text.startswith("/") and bool(first) and bool(rest) and _is_root_folder(first)


@lru_cache(maxsize=256)
def _is_root_folder(name: str) -> bool:
    # "/v1/models" is no path of a machine that has no such folder.
    try:
        return Path("/", name).is_dir()
    except (OSError, ValueError):
        return False
