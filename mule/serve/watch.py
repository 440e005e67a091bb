"""What is counted and logged of requests and answers; /metrics shows it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from mule.generate.request import Ended
from mule.serve.redaction import LOGGER

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_QUIET = ("/health", "/metrics")  # asked every few seconds
_FIRST = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)  # seconds
_EACH = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
_WHOLE = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


@dataclass
class Exchange:
    """One HTTP request as it is counted; `route` is of the table, never what a client wrote."""

    method: str
    path: str
    route: str = "(none)"
    status: int = 0
    is_cut: bool = False  # the caller left, or it took too long
    started_at: float = field(default_factory=time.perf_counter)


class Watch:
    """Counters of a server, in a registry of its own."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._log = logging.getLogger(LOGGER)
        fixed = {"registry": self._registry}
        self._requests = Counter(
            "mule_requests", "HTTP requests by route and status", ["route", "code"], **fixed
        )
        self._cut = Counter("mule_requests_cut", "Requests whose caller left", ["route"], **fixed)
        self._request_seconds = Histogram(
            "mule_request_seconds", "Whole requests", ["route"], buckets=_WHOLE, **fixed
        )
        self._prompt = Counter("mule_prompt_tokens", "Tokens of prompts", ["model"], **fixed)
        self._cached = Counter(
            "mule_prompt_tokens_cached", "Of those, known from earlier requests", ["model"], **fixed
        )
        self._generated = Counter("mule_generated_tokens", "Tokens drawn", ["model"], **fixed)
        self._answers = Counter(
            "mule_answers", "Answers by why they ended", ["model", "reason"], **fixed
        )
        self._first_token = Histogram(
            "mule_first_token_seconds", "Until the first token", ["model"], buckets=_FIRST, **fixed
        )
        self._each_token = Histogram(
            "mule_token_seconds", "Between two tokens", ["model"], buckets=_EACH, **fixed
        )
        self._waiting = Gauge(
            "mule_waiting_answers", "Answers that wait for a row", ["model"], **fixed
        )
        self._busy = Gauge("mule_busy_rows", "Rows at work", ["model"], **fixed)

    def text(self) -> bytes:
        """The figures as Prometheus reads them."""
        return generate_latest(self._registry)

    # ------------------------------------------------------------ requests

    def ended(self, exchange: Exchange) -> None:
        """Count a request and write its line: the path of a known route, never its query."""
        seconds = time.perf_counter() - exchange.started_at
        self._requests.labels(exchange.route, str(exchange.status)).inc()
        self._request_seconds.labels(exchange.route).observe(seconds)
        if exchange.is_cut:
            self._cut.labels(exchange.route).inc()
        is_dull = exchange.path in _QUIET and exchange.status == 200
        self._log.log(
            logging.DEBUG if is_dull else logging.INFO,
            "%s %s %d %.3f s%s",
            exchange.method[:16],
            exchange.path[:200],
            exchange.status,
            seconds,
            " (cut)" if exchange.is_cut else "",
        )

    def failed(self, exchange: Exchange, error: Exception) -> None:
        """A defect of ours: its kind and place."""
        self._log.error("%s failed", exchange.route, exc_info=error)

    def said(self, text: str) -> None:
        """A line of the log."""
        self._log.info("%s", text)

    # ------------------------------------------------------------ answers

    def rows(self, model: str, *, busy: Callable[[], int], waiting: Callable[[], int]) -> None:
        """Show what these functions tell when the figures are read."""
        self._busy.labels(model).set_function(busy)
        self._waiting.labels(model).set_function(waiting)

    def token(self, model: str, seconds: float, *, is_first: bool) -> None:
        (self._first_token if is_first else self._each_token).labels(model).observe(seconds)

    def answered(self, model: str, ended: Ended) -> None:
        self._answers.labels(model, ended.reason).inc()
        self._prompt.labels(model).inc(ended.num_prompt)
        self._cached.labels(model).inc(ended.num_cached)
        self._generated.labels(model).inc(ended.num_tokens)
