"""`mule serve`: runs, folders, adapters and GGUF files behind an OpenAI-compatible address."""

from __future__ import annotations

import re
import signal
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mule import progress
from mule.errors import Interrupted, UserError

if TYPE_CHECKING:
    from mule.adapters.source import Source
    from mule.generate.request import Engine

HOST, PORT = "127.0.0.1", 8080
_MAX_ID = 64


@dataclass(frozen=True)
class Address:
    """Where a server listens, who may call it, and the file of its token."""

    host: str = HOST
    port: int = PORT
    allow_hosts: Sequence[str] = ()
    token_file: Path | None = None


@dataclass(frozen=True)
class Room:
    """What an engine may take; None leaves it to the engine."""

    context: int | None = None
    max_rows: int | None = None
    queue: int | None = None


def run(
    sources: Sequence[str],
    *,
    address: Address | None = None,
    room: Room | None = None,
    names: Sequence[str] = (),
    base: str | None = None,
    on_start: Callable[[dict[str, Any]], None] = lambda _: None,
) -> dict[str, Any]:
    """Serve the sources until a signal; `on_start` gets the address, the token's file, the models.

    Raises Interrupted with the signal that ended it.
    """
    from mule.serve import server
    from mule.serve.app import Api
    from mule.serve.redaction import start_logging
    from mule.serve.token_file import TokenFile

    address, room = address or Address(), room or Room()
    with ExitStack() as stack:
        bound = server.bind(address.host, address.port)
        stack.callback(bound.close)
        _refuse_open_address(server.is_loopback(bound), address)
        hosts = server.own_hosts(bound, address.host, list(address.allow_hosts))
        found = _find_all(sources, names, base)
        token = TokenFile(address.token_file, bound.getsockname()[1])
        stack.callback(token.close)
        engines = {name: _opened(stack, source, room) for name, source in found.items()}
        start_logging(frozenset({token.token}))
        api = Api(engines, token=token.token, hosts=hosts, limits=server.with_queue(room.queue))
        stack.callback(api.close)
        started = {
            "url": f"{server.shown_address(bound, hosts)}/v1",
            "token_file": str(token.path),
            "models": list(engines),
            "chat": [name for name, engine in engines.items() if engine.chat],
        }
        signum = server.Server(api, bound, lambda: on_start(started)).answer()
    if signum is not None:
        raise Interrupted(signum, f"stopped by {signal.Signals(signum).name}")
    return started


def open_engine(
    source: Source, *, context: int | None = None, max_rows: int | None = None
) -> Engine:
    """The engine that answers many at once: our own decoder's, or llama.cpp's for a GGUF file.

    None leaves the context and the number of rows to the engine.
    """
    rows: dict[str, Any] = {} if max_rows is None else {"max_rows": max_rows}
    if source.gguf_file is not None:
        from mule.generate.llamacpp_batching import LlamaCppEngine

        return LlamaCppEngine(source.gguf_file, context_tokens=context, **rows)
    from mule.adapters.source import load_source
    from mule.commands.lineage import lineage_of
    from mule.generate.batching import BatchEngine, serving_dtype

    assert source.model_dir is not None
    dtype = serving_dtype(source.model_dir, adapted=source.adapter_dir is not None)
    model, tokenizer = load_source(source, dtype=dtype)
    chats = lineage_of(source).get("kind", "chat") == "chat"
    return BatchEngine(
        model,
        tokenizer,
        chat=chats and tokenizer.chat_template is not None,
        context_tokens=context,
        **rows,
    )


def _opened(stack: ExitStack, source: Source, room: Room) -> Engine:
    with progress.task(f"Loading {source.name}"):
        engine = open_engine(source, context=room.context, max_rows=room.max_rows)
    stack.callback(engine.close)
    return engine


def _find_all(sources: Sequence[str], names: Sequence[str], base: str | None) -> dict[str, Source]:
    """The sources by the id that clients call them by."""
    from mule.adapters.source import find_source
    from mule.serve.app import check_id

    if names and len(names) != len(sources):
        raise UserError(
            f"{len(sources)} models and {len(names)} names", "give --name once for each, in order"
        )
    if base is not None and len(sources) > 1:
        raise UserError(
            "--base says where one adapter's base is, and several models are named",
            "serve that adapter alone, or merge it first: mule merge",
        )
    found = [find_source(text, base=base) for text in sources]
    ids = list(names) or [_id_of(source) for source in found]
    for name in ids:
        check_id(name)
        if ids.count(name) > 1:
            raise UserError(
                f"two models would be called {name}", "give each its own: --name A --name B"
            )
    return dict(zip(ids, found, strict=True))


def _id_of(source: Source) -> str:
    name = re.sub(r"[^a-z0-9._-]+", "-", source.name.lower()).strip("-._")
    return name[:_MAX_ID] or "model"


def _refuse_open_address(is_loopback: bool, address: Address) -> None:
    if not is_loopback and address.token_file is None:
        raise UserError(
            f"{address.host} can be reached from other machines",
            "name the file of a token that you hand to its callers: --token-file FILE "
            "(made if there is none); or leave --host out",
        )
