"""The talker of one request at a time: what `mule chat --mlx` answers with."""

from __future__ import annotations

import queue
from pathlib import Path

import pytest

from mule.adapters.source import find_source, load_source
from mule.generate.engine import stream
from mule.generate.request import Ended, Event, Request
from mule.generate.sampler import Sampling
from mule.generate.stream_talker import StreamTalker
from tests.parity.tiny_gguf import PROMPTS, save_tiny

ANY = frozenset[int]()  # of stop tokens: none


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> StreamTalker:
    folder: Path = tmp_path_factory.mktemp("talker") / "m"
    save_tiny(folder, "qwen3", num_hidden_layers=1, max_position_embeddings=128)
    return StreamTalker(*load_source(find_source(str(folder))), chat=True)


def events(talker: StreamTalker, request: Request, *, cancel_after: int = -1) -> list[Event]:
    inbox: queue.SimpleQueue[Event] = queue.SimpleQueue()
    job = talker.submit(request, inbox.put)
    found: list[Event] = []
    while not (found and isinstance(found[-1], Ended)):
        if len(found) == cancel_after:
            job.cancel()
        found.append(inbox.get(timeout=60))
    job.join()
    return found


def test_it_streams_what_the_decoder_says(talker: StreamTalker) -> None:
    ids = talker.encode_chat(PROMPTS[0])
    stops = talker._tokenizer.stop_ids
    num_tokens = talker._tokenizer.vocab_size
    expected = list(stream(talker._model, ids, max_tokens=9, stop_ids=stops, vocab_size=num_tokens))
    *tokens, ended = events(talker, Request(tuple(ids), 9, Sampling()))
    assert [token.id for token in tokens if not isinstance(token, Ended)] == expected
    assert isinstance(ended, Ended) and ended.num_tokens == len(expected)
    assert ended.reason == ("length" if len(expected) == 9 else "stop")
    assert talker.encode("a") == talker._tokenizer.encode("a") and talker.chat


def test_it_ends_with_the_context_and_when_it_is_cancelled(talker: StreamTalker) -> None:
    request = Request(tuple([40] * 120), 99, Sampling(temperature=3.0, seed=1))
    *tokens, ended = events(talker, request)
    assert isinstance(ended, Ended) and ended.reason in ("context", "stop") and len(tokens) <= 9
    request = Request((40, 41), 99, Sampling(temperature=3.0, seed=1))
    *tokens, ended = events(talker, request, cancel_after=2)
    assert isinstance(ended, Ended) and ended.reason == "cancelled" and len(tokens) < 99


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_model_that_fails_ends_the_answer(
    talker: StreamTalker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(talker._model, "step", None)
    (ended,) = events(talker, Request((40, 41), 9, Sampling()))
    assert isinstance(ended, Ended)
    assert (ended.reason, ended.error) == ("failed", "the model failed while it answered")
