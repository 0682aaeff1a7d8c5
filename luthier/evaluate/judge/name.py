"""Who judges, with which key, and what it may cost: read from the command line, refused before anything is loaded."""

from __future__ import annotations

import os
import urllib.parse
from dataclasses import dataclass

from luthier.errors import ConfigError
from luthier.evaluate.judge.answers import Side, check_model, fingerprint
from luthier.evaluate.judge.budget import price_of, undated
from luthier.evaluate.judge.client import OPENAI
from luthier.evaluate.judge.human import HUMAN
from luthier.generate.identity import model_names

OPENAI_KEY = "OPENAI_API_KEY"


@dataclass(frozen=True)
class JudgeName:
    """A judge as it was named. `kind`: endpoint, local or human. `key`: what stored verdicts know it by."""

    kind: str
    model: str
    key: str
    url: str = ""

    @property
    def is_human(self) -> bool:
        return self.kind == HUMAN


@dataclass(frozen=True)
class Limits:
    """What asking an endpoint may cost and how it is done."""

    max_cost: float | None
    max_tokens: int | None
    price: tuple[float, float] | None
    threads: int
    retries: int
    timeout: float
    judge_tokens: int


def judge_name(judge: str | None, human: bool) -> JudgeName:
    """The judge that `--judge` or `--human` names. ConfigError: none, both, or a form that there is not;
    ModelError: no such local model."""
    if human:
        if judge is not None:
            raise ConfigError("--human and --judge: one of the two")
        return JudgeName(HUMAN, HUMAN, HUMAN)
    forms = "openai:MODEL, http://HOST/v1#MODEL, or local:PATH"
    if judge is None:
        raise ConfigError(f"who judges? --judge {forms}; or --human")
    scheme, _, rest = judge.partition(":")
    if scheme == "openai" and rest:
        return JudgeName("endpoint", rest, f"{OPENAI}#{rest}", OPENAI)
    if scheme == "local" and rest:
        check_model(rest)
        return JudgeName("local", rest, f"local:{fingerprint(rest)}")
    if scheme in ("http", "https"):
        parts = urllib.parse.urlsplit(judge)
        if not parts.hostname or not parts.fragment:
            raise ConfigError(f"--judge {judge}: an address and a model are needed, as in http://HOST/v1#MODEL")
        if parts.username or parts.password or parts.query:
            # The address is written into results; what is secret must not be part of it.
            raise ConfigError("--judge: leave user, password and query out of the address; a key goes by --api-key-env")
        url = urllib.parse.urlunsplit((parts.scheme, parts.netloc, parts.path.rstrip("/"), "", ""))
        url = url.removesuffix("/chat/completions")
        return JudgeName("endpoint", parts.fragment, f"{url}#{parts.fragment}", url)
    raise ConfigError(f"--judge {judge}: no such judge; it is {forms}")


def own_judge(name: JudgeName, side: Side) -> str | None:
    """The model that is the judge, or what it was made from, and also this side; None: they are different."""
    if name.is_human:
        return None
    if name.kind == "local":
        own = {each.casefold() for each in model_names(name.model)}
        return next((each for each in sorted(side.names) if each.casefold() in own), None)

    def short(model: str) -> str:
        # OpenAI calls what it has tuned `ft:BASE:WHOSE:...`; Ollama and others call a model itself `NAME:latest`.
        model = model.split(":")[1] if model.startswith("ft:") else model.removesuffix(":latest")
        return undated(model.rstrip("/").rpartition("/")[2].casefold())

    return next((each for each in sorted(side.names) if short(each) == short(name.model)), None)


def api_key(name: JudgeName, variable: str | None) -> str | None:
    """The key for an endpoint. OpenAI's goes to OpenAI only, unless the user names it for another host."""
    if name.kind != "endpoint":
        if variable is not None:
            raise ConfigError("--api-key-env: only a judge behind an endpoint has a key")
        return None
    if variable is None and name.url != OPENAI:
        return None
    found = os.environ.get(variable or OPENAI_KEY, "").strip()
    if not found:
        raise ConfigError(f"the variable {variable or OPENAI_KEY} holds no key; set it, or name another: --api-key-env")
    if not found.isascii() or not found.isprintable():
        raise ConfigError(f"the variable {variable or OPENAI_KEY} holds something that is no key")
    return found


def limits_of(
    name: JudgeName,
    max_cost: float | None,
    max_tokens: int | None,
    prices: tuple[float | None, float | None],
    parallel: int,
    retries: int,
    timeout: float,
    judge_tokens: int,
) -> Limits:
    """ConfigError: limits that this judge has no use for, or a cap in dollars without prices. Prices: in, out."""
    if name.kind != "endpoint" and (max_cost, max_tokens, *prices) != (None,) * 4:
        raise ConfigError("--max-cost, --max-tokens-total and prices are for a judge behind an endpoint")
    if (prices[0] is None) != (prices[1] is None):
        raise ConfigError("--price-in and --price-out: give both")
    price = price_of(name.model) if name.url == OPENAI else None
    if prices[0] is not None and prices[1] is not None:
        price = prices[0], prices[1]
    if max_cost is not None and not max_cost > 0:
        raise ConfigError(f"--max-cost {max_cost:g}: it must be above 0")
    if max_cost is not None and price is None:
        raise ConfigError(
            f"--max-cost: the prices of {name.model} are not known here: add --price-in and --price-out (dollars per "
            "million tokens), or cap the tokens by --max-tokens-total"
        )
    return Limits(max_cost, max_tokens, price, parallel, retries, timeout, judge_tokens)
