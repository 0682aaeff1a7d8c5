"""What a judge may cost: prices, and a purse that is never overdrawn.

Before a request its largest possible cost is set aside (no tokenizer makes more tokens of a text than it has bytes,
and the answer is bounded by the request); afterwards what the server says it used takes its place. So the cap holds
with any number of requests in flight, and stops a little early instead of late.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from dataclasses import dataclass

# Dollars per million tokens, in and out, as OpenAI listed them in August 2025; --price-in and --price-out override.
PRICES: dict[str, tuple[float, float]] = {
    "gpt-4o": (2.5, 10.0),
    "gpt-4o-2024-05-13": (5.0, 15.0),
    "gpt-4o-mini": (0.15, 0.6),
    "gpt-4.1": (2.0, 8.0),
    "gpt-4.1-mini": (0.4, 1.6),
    "gpt-4.1-nano": (0.1, 0.4),
    "gpt-5": (1.25, 10.0),
    "gpt-5-mini": (0.25, 2.0),
    "gpt-5-nano": (0.05, 0.4),
    "o3": (2.0, 8.0),
    "o4-mini": (1.1, 4.4),
}

_DATE = re.compile(r"-\d{4}-\d{2}-\d{2}$")


def undated(model: str) -> str:
    """A model's name without the date of its version: `gpt-4o-2024-08-06` -> `gpt-4o`."""
    return _DATE.sub("", model)


def price_of(model: str) -> tuple[float, float] | None:
    """Dollars per million tokens of a model of OpenAI's, in and out; None: not in the table."""
    return PRICES.get(model) or PRICES.get(undated(model))


@dataclass(frozen=True)
class Use:
    """Tokens that went in and came out."""

    tokens_in: int = 0
    tokens_out: int = 0

    def __add__(self, other: Use) -> Use:
        return Use(self.tokens_in + other.tokens_in, self.tokens_out + other.tokens_out)

    @property
    def total(self) -> int:
        return self.tokens_in + self.tokens_out

    def cost(self, price: tuple[float, float] | None) -> float | None:
        """Dollars; None without a price."""
        return None if price is None else (self.tokens_in * price[0] + self.tokens_out * price[1]) / 1e6


class Purse:
    """Counts what is used; `spent` begins with what earlier commands used for the same verdicts.

    Args:
        price: dollars per million tokens, in and out. max_cost: dollars, needs a price. max_tokens: both ways together.
    """

    def __init__(
        self,
        price: tuple[float, float] | None = None,
        max_cost: float | None = None,
        max_tokens: int | None = None,
        spent: Use | None = None,
    ) -> None:
        assert max_cost is None or price is not None
        self.price, self.max_cost, self.max_tokens = price, max_cost, max_tokens
        self.spent = spent or Use()
        self.unreported = 0  # requests whose use nobody said; they are counted at their largest
        self._aside = Use()
        self._requests = 0
        self._changed = threading.Condition()

    def reserve(self, most: Use, stopped: Callable[[], bool] = lambda: False) -> bool:
        """Set aside what a request may use at most. False: it does not fit, and nothing in flight could make room."""
        with self._changed:
            while not self._fits(most):
                if not self._requests or stopped():
                    return False
                self._changed.wait(0.1)
            self._aside += most
            self._requests += 1
            return True

    def settle(self, most: Use, used: Use | None) -> None:
        """Replace what was set aside by what was used; None: unknown, it stays."""
        with self._changed:
            self._aside += Use(-most.tokens_in, -most.tokens_out)
            self._requests -= 1
            self.spent += most if used is None else used
            self.unreported += used is None
            self._changed.notify_all()

    def _fits(self, most: Use) -> bool:
        after = self.spent + self._aside + most
        if self.max_tokens is not None and after.total > self.max_tokens:
            return False
        return self.max_cost is None or (after.cost(self.price) or 0.0) <= self.max_cost
