"""Requests and events as JSON, between Mule and the child process that runs llama.cpp."""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import Any

from mule.generate.request import Ended, Event, Request, Token
from mule.generate.sampler import Sampling


def request_fields(request: Request) -> dict[str, Any]:
    """A request as JSON values."""
    stop_ids = None if request.stop_ids is None else sorted(request.stop_ids)
    plain = {field.name: getattr(request, field.name) for field in fields(request)}
    return plain | {"sampling": asdict(request.sampling), "stop_ids": stop_ids}


def request_of(values: dict[str, Any]) -> Request:
    """The request that `request_fields` wrote."""
    stop_ids = values["stop_ids"]
    return Request(
        **values
        | {
            "ids": tuple(values["ids"]),
            "stop": tuple(values["stop"]),
            "sampling": Sampling(**values["sampling"]),
            "stop_ids": None if stop_ids is None else frozenset(stop_ids),
        }
    )


def event_fields(event: Event) -> list[Any]:
    """A token as [id, text, logprob, top]; an end as its values, the reason first."""
    if isinstance(event, Token):
        return [event.id, event.text, event.logprob, event.top]
    return [event.reason, *(getattr(event, field.name) for field in fields(event)[1:])]


def event_of(values: list[Any]) -> Event:
    """The event that `event_fields` wrote."""
    if isinstance(values[0], str):
        return Ended(*values)
    token, text, logprob, top = values
    return Token(token, text, logprob, tuple((id, value) for id, value in top))
