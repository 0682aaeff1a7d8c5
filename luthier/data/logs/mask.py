"""Secrets and personal data -> placeholders such as <IP>, by patterns that are stated here, each with its count.

Most masks look for words, and whether one of them can match a text is known from the text's shape, in which each
number is one zero: the shapes of a log repeat, its texts do not, and what was found out for a shape is remembered.
The others (cards, hardware addresses, random strings) are of digits of a certain length: records that may hold one
are picked out of a whole block by patterns that are quick.
What is masked beyond doubt cannot be said by any pattern; docs/logs.md says what each finds.
"""

# ruff: noqa: E501 (a pattern is easier to read in one line)

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from luthier.config.secrets import TOKEN_SHAPES
from luthier.data.logs.counts import Counts
from luthier.errors import ConfigError

_H = "[0-9A-Fa-f]"


def _luhn(text: str) -> bool:
    """Whether digits are a card's: the check digit is right."""
    digits = [int(ch) for ch in text if ch.isdigit()]
    if not 2 <= digits[0] <= 6:
        return False
    doubled = [sum(divmod(2 * d, 10)) for d in digits[-2::-2]]
    return len(set(digits)) > 1 and (sum(digits[-1::-2]) + sum(doubled)) % 10 == 0


def _random(text: str) -> bool:
    """Whether letters and digits look drawn, not written: 3.5 bits a character (3 of hexadecimal), both kinds of them,
    in one run of at least 20; a path of words is none."""
    if not re.search(r"\d", text) or not re.search(r"[A-Za-z]", text) or re.search(r"(?:^|/)[A-Za-z_.-]{2,}\d*(?:/|$)", text):
        return False
    if max(map(len, re.split(r"[-_/]", text))) < 20:
        return False
    shares = [n / len(text) for n in Counter(text).values()]
    return -sum(p * math.log2(p) for p in shares) > (3.0 if re.fullmatch(f"{_H}+", text) else 3.5)


@dataclass(frozen=True)
class Mask:
    """A kind of secret.

    Attributes:
        pattern: of groups named `s`, if there are any, one is the secret, and the rest of the match stays; else it
            is the whole match. check: a second look. on: masked unless it is asked for or against.
        by_shape: whether it takes all digits alike.
    """

    name: str
    placeholder: str
    pattern: re.Pattern[str]
    says: str
    check: Callable[[str], bool] | None = None
    on: bool = True
    by_shape: bool = True


def _mask(name: str, pattern: str, says: str, **more: object) -> Mask:
    return Mask(name, f"<{name.upper().replace('-', '_')}>", re.compile(pattern, re.ASCII), says, **more)  # type: ignore[arg-type]


_BEFORE_SECRET = (
    r"(?:pass(?:word|wd|phrase)?|pwd|secret|api[_-]?key|access[_-]?key(?:[_-]?id)?|secret[_-]?key|private[_-]?key|token"
    r"|auth[_-]?token|client[_-]?secret|credentials?|session[_-]?id|cookie)"
)
_USER = r"[^\s\x00:;,\"'()\[\]<>=|]+"
MASKS = (
    _mask("private-key", r"-----BEGIN [A-Z0-9 ]*PRIVATE KEY[A-Z ]*-----[^-\x00]*(?:-----END [A-Z0-9 ]*PRIVATE KEY[A-Z ]*-----)?",
          "blocks between BEGIN and END PRIVATE KEY"),
    _mask("jwt", r"\beyJ[A-Za-z0-9_-]{5,}\.[A-Za-z0-9_-]{5,}(?:\.[A-Za-z0-9_-]*)?", "JSON web tokens"),
    _mask("token", rf"\b(?:{'|'.join(TOKEN_SHAPES)}|github_pat_\w{{22,}}|glpat-[\w-]{{20,}}|ASIA[0-9A-Z]{{16}}"
          r"|xox[abeprs]-[\w-]{10,}|AIza[\w-]{35}|npm_\w{36}|pypi-[\w-]{50,}|dop_v1_\w{64})",
          "keys of AWS, GitHub, GitLab, Slack, Google, Hugging Face, OpenAI, npm, PyPI"),
    _mask("bearer", r"(?i:\b(?:bearer|basic)\s+)(?P<s>[A-Za-z0-9._~+/=-]{16,})", "what follows Bearer or Basic"),
    _mask("login", r"(?<=://)(?P<s>[^\s/@:\x00]+:[^\s/@\x00]+)(?=@)", "name and password in a URL"),
    _mask("password", rf"(?i:{_BEFORE_SECRET}[\"']?(?:=|\s=\s|:\s?))(?:\"(?P<s>[^\"\x00]+)\"|'(?P<t>[^'\x00]+)'|(?P<u>[^\s\"',;&<>(){{}}\[\]\x00]+))",
          "values behind password=, token:, api_key= and the like"),
    _mask("email", r"(?<![\w.+-])[\w.+-]{1,64}@(?:[A-Za-z0-9-]{1,63}\.)+[A-Za-z]{2,24}\b", "e-mail addresses"),
    _mask("mac", rf"(?<![\w:-])(?:{_H}{{2}}[:-]){{5}}{_H}{{2}}(?![\w:-])", "MAC addresses"),
    _mask("ip", r"(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?![\w]|\.\d)", "IPv4 addresses"),
    _mask("ipv6", rf"(?<![\w:.])(?:(?:{_H}{{1,4}}:){{7}}{_H}{{1,4}}|(?:{_H}{{1,4}}:){{1,6}}(?::{_H}{{1,4}}){{1,6}}|(?:{_H}{{1,4}}:){{2,7}}:"
          rf"|::(?:{_H}{{1,4}}:){{1,6}}{_H}{{1,4}}|::1|fe80::[0-9A-Fa-f:]+)(?![\w:])", "IPv6 addresses"),
    _mask("card", r"(?<![\w.-])(?:\d{15,16}|\d{4} \d{4} \d{4} \d{4}|\d{4}-\d{4}-\d{4}-\d{4}|\d{4} \d{6} \d{5}|\d{4}-\d{6}-\d{5})(?![\w-])",
          "numbers of credit cards (15 or 16 digits, of which the last checks the others)", check=_luhn),
    _mask("user", rf"(?i:\b(?:user(?:name|id)?|login|logname|ruser|account|uname|owner)[\"']?(?:=|\s=\s|:\s?)[\"']?)(?P<s>{_USER})"
          rf"|(?i:\b(?:invalid|illegal|unknown|for|of|by)\s+user\s+)(?P<t>(?!name\b|unknown\b|request\b){_USER})"
          rf"|\b(?:(?:Failed|Accepted|Postponed) \S+ for|session (?:opened|closed) for user|authentication failures? for|Invalid user|"
          rf"Connection (?:closed|reset) by authenticating user) (?P<u>(?!invalid\b|illegal\b|user\b|from\b){_USER})",
          "names behind user=, Invalid user, Accepted password for and the like"),
    _mask("home", r"(?:/home/|/Users/|\\Users\\)(?P<s>[^\s/\\:;,\"'()\[\]<>|]+)", "names of home folders"),
    _mask("secret", r"(?<![\w/+.=-])(?:[0-9a-f]{32,}|[0-9A-F]{32,}|[A-Za-z0-9+/_-]{32,}={0,2})(?![\w/+=-])",
          "hexadecimal and base64 of 32 characters or more that look random", check=_random),
    _mask("host", r"(?<![\w.@/-])(?:[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?\.){1,8}(?:com|net|org|edu|gov|mil|int|io|dev|local|lan|internal|info|biz|[a-z]{2})(?::(?=\d))?\b(?![\w.(-])",
          "names of hosts", on=False),
)  # fmt: skip
NAMES = tuple(mask.name for mask in MASKS)
_NUMBER = re.compile(r"\d[0-9A-Fa-f]*", re.ASCII)
_LETTERS_BEFORE = re.compile("[A-Fa-f]+0")


def shape(text: str) -> str:
    """The text with each number, and each hexadecimal one, as a single zero."""
    return _LETTERS_BEFORE.sub("0", _NUMBER.sub("0", text))


def chosen(mask: list[str], no_mask: list[str]) -> tuple[str, ...]:
    """The names of the masks that are used. `all`, `none` and names, several with commas between.

    Raises ConfigError: no such mask.
    """
    wanted, unwanted = (_names(option, given) for option, given in (("--mask", mask), ("--no-mask", no_mask)))
    usual = {each.name for each in MASKS if each.on}
    used = (usual | wanted) - unwanted
    return tuple(name for name in NAMES if name in used)


def _names(option: str, given: list[str]) -> set[str]:
    import difflib

    found: set[str] = set()
    for name in (part.strip().lower() for text in given for part in text.split(",")):
        if name == "all":
            found |= set(NAMES)
        elif name in NAMES:
            found.add(name)
        elif name:
            near = difflib.get_close_matches(name, NAMES, n=1)
            meant = f" Did you mean {near[0]}?" if near else ""
            raise ConfigError(f"{option} {name}: there is no such mask.{meant} There are {', '.join(NAMES)}, and all")
    return found


def own_mask(text: str) -> tuple[str, str]:
    """`NAME=REGEX`. Raises ConfigError: it is none."""
    name, equals, pattern = text.partition("=")
    if not equals or not re.fullmatch(r"[A-Za-z][\w-]*", name) or not pattern:
        raise ConfigError(f"--mask-pattern {text!r}: write NAME=REGEX, such as ORDER=\\bORD-\\d{{8}}\\b")
    if name.lower() in NAMES:
        raise ConfigError(f"--mask-pattern {name}: there is a mask of that name; choose another")
    try:
        found = re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"--mask-pattern {name}: {pattern!r} is no regular expression: {error}") from error
    if found.search("") is not None:
        raise ConfigError(f"--mask-pattern {name}: {pattern!r} matches an empty text, so that it would be everywhere")
    return name.lower(), pattern


# What a shape has to hold for a mask to find anything in its texts, in small letters: far quicker to look for than the
# pattern. A letter up to f beside a number is no longer in a shape, so some of these are beginnings or ends of words.
_HINTS: dict[str, tuple[str, ...]] = {
    "private-key": ("private key",),
    "jwt": ("eyj",),
    "token": ("hf_", "sk-", "gh", "aki", "asi", "glpat-", "xox", "aiz", "npm_", "pypi-", "dop_v"),
    "bearer": ("bearer", "basic"),
    "login": ("://",),
    "password": ("pass", "pw", "secret", "key", "token", "redential", "session", "ooki"),
    "email": ("@",),
    "ip": ("0.0.0.0",),
    "user": ("user", "login", "logname", "account", "uname", "owner", " for "),
    "home": ("/home/", "/users/", "\\users\\"),
    "host": (".",),
}
# Masks without a length in their pattern, and without a second look: they find nothing in a text if not in its shape.
_OF_SHAPE = frozenset(("login", "password", "user", "home"))
_BETWEEN = "\x00"  # no record has one, and no pattern matches it


def _as(letter: bytes, characters: str) -> bytes:
    """A table for `translate`: all of these as one letter."""
    told = characters.encode()
    return bytes.maketrans(told, letter * len(told))


_DIGITS = "0123456789"
_HEX = _DIGITS + "abcdefABCDEF"
_WORDY = _HEX + "ghijklmnopqrstuvwxyzGHIJKLMNOPQRSTUVWXYZ+/_-"
# Masks of numbers with a certain length: a table, what shortens runs of zeros, and what then is in a text that has one.
_MAY_BE: dict[str, tuple[bytes, bool, tuple[bytes, ...]]] = {
    "mac": (_as(b"0", _HEX), False, (b":00:00:00:", b"-00-00-00-")),
    "ipv6": (_as(b"0", _HEX), True, (b"::", b":0:0:0:")),
    "card": (_as(b"0", _DIGITS), False,
             (b"0" * 15, b"0000 0000 0000 ", b"0000-0000-0000-", b"0000 000000 0", b"0000-000000-0")),
    "secret": (_as(b"0", _WORDY), False, (b"0" * 32,)),
}  # fmt: skip
_LONG = re.compile("[A-Za-z0-9+/_-]{32,}")
_LONG_PART = re.compile("[A-Za-z0-9+]{18}")  # without which `_random` says no


def _places(joined: bytes, mark: bytes) -> Iterator[int]:
    """Which of the texts that were joined have a mark."""
    at, begin = 0, 0
    while (found := joined.find(mark, begin)) >= 0:
        at += joined.count(b"\x00", begin, found)
        yield at
        begin = joined.find(b"\x00", found)
        if begin < 0:
            return


def _may_be_random(text: str) -> bool:
    return any(_LONG_PART.search(found) is not None for found in _LONG.findall(text))


class Masker:
    """All masks of a run."""

    def __init__(self, names: tuple[str, ...], own: tuple[tuple[str, str], ...], key_file: str | None, counts: Counts):
        """`key_file`: with one, a placeholder has a pseudonym of the secret in it: <IP_3fa2c1d0>."""
        self._own = tuple(
            Mask(name, f"<{name.upper().replace('-', '_')}>", re.compile(pattern), "", by_shape=False) for name, pattern in own
        )
        known = [mask for mask in MASKS if mask.name in names]
        self._order = {mask.name: n for n, mask in enumerate(known)}
        self._by_words = [(mask, _HINTS[mask.name]) for mask in known if mask.name in _HINTS]
        self._by_length = [(mask, _MAY_BE[mask.name]) for mask in known if mask.name in _MAY_BE]
        self._counts = counts
        self._key: bytes | None = None
        if key_file is not None:
            try:
                self._key = hashlib.blake2b(Path(key_file).expanduser().read_bytes()).digest()
            except OSError as error:
                raise ConfigError(f"--pseudonyms {key_file}: cannot be read: {error.strerror}") from error
        self.depends_on_text = bool(own)
        """Whether it takes more than a text's shape to know what is masked in it."""

    def shapes(self, texts: list[str]) -> tuple[list[str], dict[int, tuple[Mask, ...]]]:
        """The shape of each text, and the masks that look for numbers of a certain length, for the texts (by their
        places) in which these may find one."""
        joined = _BETWEEN.join(texts)
        data = joined.encode("utf-8", "surrogatepass")
        found: dict[int, tuple[Mask, ...]] = {}
        for mask, (table, shortened, marks) in self._by_length:
            told = data.translate(table)
            if shortened:
                told = told.replace(b"0000", b"0").replace(b"00", b"0").replace(b"00", b"0")
            for at in sorted({at for mark in marks for at in _places(told, mark)}):
                if mask.name != "secret" or _may_be_random(texts[at]):
                    found[at] = (*found.get(at, ()), mask)
        return shape(joined).split(_BETWEEN), found

    def that_may_match(self, shaped: str, by_length: tuple[Mask, ...] = ()) -> tuple[Mask, ...]:
        """All that may find something in a text of this shape, in the order in which they are used."""
        low = shaped.lower()
        found = [mask for mask, hints in self._by_words if any(hint in low for hint in hints)]
        found = [mask for mask in found if mask.name not in _OF_SHAPE or mask.pattern.search(shaped)]
        return (*self._own, *sorted((*found, *by_length), key=lambda mask: self._order[mask.name]))

    def masked(self, text: str, masks: tuple[Mask, ...]) -> str:
        for mask in masks:
            if mask.check is None and self._key is None and not mask.pattern.groups:
                text, n = mask.pattern.subn(mask.placeholder, text)
                if n:
                    self._counts[f"masked.{mask.name}"] += n
            else:
                text = mask.pattern.sub(partial(self._replaced, mask), text)
        return text

    def _replaced(self, mask: Mask, found: re.Match[str]) -> str:
        """The match with its secret replaced: that is the group that took part, or all of it."""
        group = found.lastindex if mask.by_shape and found.lastindex else 0
        secret = found[group]
        # What another mask has been at, or a word that stands for nothing.
        if (mask.check is not None and not mask.check(secret)) or secret.startswith("<") or secret in _NOTHING:
            return found[0]
        self._counts[f"masked.{mask.name}"] += 1
        placeholder = mask.placeholder
        if self._key is not None:
            digest = hashlib.blake2b(secret.encode("utf-8", "surrogatepass"), key=self._key, digest_size=4).hexdigest()
            placeholder = f"{placeholder[:-1]}_{digest}>"
        begin, end = found.start(group) - found.start(), found.end(group) - found.start()
        return found[0][:begin] + placeholder + found[0][end:]


_NOTHING = frozenset(("null", "None", "nil", "undefined", "(null)", "unknown", "true", "false", "-", "*", "***"))
