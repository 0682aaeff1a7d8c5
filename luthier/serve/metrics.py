"""Figures of a server for Prometheus, in a registry of their own."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """What is counted; `model` is one of the served names, or empty where a request has named none of them."""

    def __init__(self) -> None:
        self.registry = own = CollectorRegistry()
        self.requests = Counter(
            "luthier_requests",
            "Requests by the status that they were answered with.",
            ["endpoint", "model", "status"],
            registry=own,
        )
        self.vanished = Counter(
            "luthier_vanished_clients", "Clients that left before their answer had ended.", registry=own
        )
        self.prompt_tokens = Counter(
            "luthier_prompt_tokens", "Tokens of prompts, once for each request.", ["model"], registry=own
        )
        self.new_tokens = Counter("luthier_generated_tokens", "Tokens written.", ["model"], registry=own)
        self.lost = Counter("luthier_lost_answers", "Answers that were given up.", ["problem"], registry=own)
        self.first_token = Histogram(
            "luthier_first_token_seconds",
            "From a request to its first token.",
            ["model"],
            buckets=_SECONDS,
            registry=own,
        )
        self.seconds = Histogram(
            "luthier_answer_seconds",
            "From a request to the end of its answer.",
            ["model"],
            buckets=_SECONDS,
            registry=own,
        )

    def watch(self, waiting: Callable[[], float], running: Callable[[], float]) -> None:
        """Read these two whenever somebody asks."""
        Gauge("luthier_waiting_texts", "Texts without a token yet.", registry=self.registry).set_function(waiting)
        Gauge("luthier_running_texts", "Texts that are being written.", registry=self.registry).set_function(running)

    def page(self) -> bytes:
        return bytes(generate_latest(self.registry))
