"""What a reader gets of an answer: whole characters, cut exactly at the first stop text."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mule.errors import UserError
from mule.generate.answer import AnswerText, PieceDecoder
from mule.generate.request import Ended, Event, Request, Token
from mule.generate.sampler import Drawn, Sampling
from mule.tokenizer import StreamDecoder, Tokenizer

STOP_ID = 10_000
PROMPT = (1, 2, 3)


def run(pieces: list[bytes], *, ended_by: str = "cancelled", **settings: Any) -> list[Event]:
    """The events of an answer of these tokens; token n is the nth piece."""
    stop = tuple(settings.pop("stop", ()))
    max_tokens = settings.pop("max_tokens", 10**6)
    request = Request(PROMPT, max_tokens, Sampling(), stop=stop)
    limits = {"stop_ids": {STOP_ID}, "context_tokens": 10**7} | settings
    answer = AnswerText(request, PieceDecoder(pieces.__getitem__), **limits)
    events: list[Event] = []
    for token in range(len(pieces)):
        events += answer.push(Drawn(token))
        if isinstance(events[-1], Ended):
            return events
    if ended_by == "stop":
        return events + answer.push(Drawn(STOP_ID))
    return [*events, answer.end("cancelled")]


def text_of(events: list[Event]) -> str:
    return "".join(event.text for event in events)


def ended(events: list[Event]) -> Ended:
    *tokens, last = events
    assert isinstance(last, Ended) and all(isinstance(event, Token) for event in tokens)
    assert last.num_tokens == len(tokens) and last.num_prompt == len(PROMPT)
    return last


def cut(data: bytes, places: list[int]) -> list[bytes]:
    ends = sorted({place % (len(data) + 1) for place in places} | {len(data)})
    return [data[start:end] for start, end in zip([0, *ends], ends)]


def before_first_stop(text: str, stops: list[str]) -> tuple[str, bool]:
    """Read character by character until a stop text is complete; the longest such is cut off."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            return text[: end - max(map(len, complete))], True
    return text, False


letters = st.text(alphabet="aabé👍", max_size=40)
stops = st.lists(st.text(alphabet="abé👍", min_size=1, max_size=4), max_size=4)


@settings(deadline=None)
@given(
    letters,
    stops,
    st.lists(st.integers(0, 200), max_size=30),
    st.sampled_from(["stop", "cancelled"]),
)
def test_the_text_is_that_before_the_first_stop_whatever_the_cut(
    text: str, stop: list[str], places: list[int], ended_by: str
) -> None:
    events = run(cut(text.encode(), places), stop=stop, ended_by=ended_by)
    expected, stopped = before_first_stop(text, stop)
    assert text_of(events) == expected
    assert ended(events).reason == ("stop" if stopped else ended_by)


@settings(deadline=None)
@given(st.binary(max_size=30), st.lists(st.integers(0, 200), max_size=10))
def test_bytes_that_are_no_text_are_shown_as_the_whole_would_be(
    data: bytes, places: list[int]
) -> None:
    assert text_of(run(cut(data, places))) == data.decode("utf-8", "replace")


@settings(deadline=None)
@given(letters, st.lists(st.integers(0, 200), max_size=30))
def test_nothing_is_held_back_longer_than_it_must(text: str, places: list[int]) -> None:
    """What was shown, and at most the beginning of the stop text, is what has come."""
    pieces = cut(text.encode(), places)
    shown, came = "", b""
    for event, piece in zip(run(pieces, stop=["abab"]), pieces):
        came += piece
        shown += event.text
        if "abab" in came.decode("utf-8", "ignore"):
            return
        held = came.decode("utf-8", "ignore").removeprefix(shown)
        assert held == "" or "abab".startswith(held)


def test_a_stop_text_inside_one_token() -> None:
    events = run([b"one\nUser: two"], stop=["\nUser:"])
    assert events[0] == Token(0, "one")
    assert ended(events) == Ended("stop", "", 3, 0, 1)


def test_a_stop_text_across_tokens_and_one_that_stays_a_beginning() -> None:
    events = run([b"a\n", b"Us", b"age ", b"\nUs", b"er", b": no"], stop=["\nUser:", "###"])
    assert [event.text for event in events] == ["a", "", "\nUsage ", "", "", "", ""]
    assert ended(events).reason == "stop"


def test_what_was_held_back_is_shown_when_the_answer_ends() -> None:
    assert ended(run([b"so \n"], stop=["\nUser:"], ended_by="stop")) == Ended("stop", "\n", 3, 0, 1)
    assert ended(run([b"so \xf0\x9f"])).text == "\ufffd"
    events = run([b"a", b"b\n"], stop=["\nUser:"], max_tokens=2)
    assert ended(events) == Ended("length", "\n", 3, 0, 2)


def test_the_order_of_reasons() -> None:
    assert ended(run([b"a", b"#"], stop=["#"], max_tokens=2)).reason == "stop"
    # 3 of the prompt, 2 more in the cache, and one drawn from a full context.
    events = run([b"a"] * 9, context_tokens=5)
    assert (ended(events).reason, ended(events).num_tokens) == ("context", 3)
    assert ended(run([b"a"] * 9, context_tokens=5, max_tokens=3)).reason == "length"


def test_a_constraint_that_is_met_ends_the_answer() -> None:
    request = Request(PROMPT, 9, Sampling())
    decoder = PieceDecoder([b"{", b"}"].__getitem__)
    answer = AnswerText(request, decoder, stop_ids=set(), context_tokens=99)
    answer.num_cached = 2
    assert answer.push(Drawn(0)) == [Token(0, "{")]
    assert answer.push(Drawn(1), finished=True) == [Token(1, "}"), Ended("stop", "", 3, 2, 2)]


def test_an_error_is_passed_on_with_the_log_probabilities_before_it() -> None:
    answer = AnswerText(
        Request(PROMPT, 9, Sampling()),
        PieceDecoder([b"x"].__getitem__),
        stop_ids=set(),
        context_tokens=99,
    )
    (token,) = answer.push(Drawn(0, -0.5, ((0, -0.5),)))
    assert token == Token(0, "x", -0.5, ((0, -0.5),))
    assert answer.end("failed", "the model gave NaN") == Ended(
        "failed", "", 3, 0, 1, "the model gave NaN"
    )


def test_our_tokenizer_gives_the_same_text() -> None:
    text = "L'été, «où» 👍 étais-tu ? STOP et après"
    tokenizer = Tokenizer.train([text, "the cat sat"] * 3, 290)
    ids = tokenizer.encode(text)
    request = Request(PROMPT, 999, Sampling(), stop=(" STOP",))
    answer = AnswerText(
        request, StreamDecoder(tokenizer), stop_ids=set(tokenizer.stop_ids), context_tokens=999
    )
    events: list[Event] = []
    for token in ids:
        events += answer.push(Drawn(token))
        if isinstance(events[-1], Ended):
            break
    assert text_of(events) == "L'été, «où» 👍 étais-tu ?"
    assert ended(events).reason == "stop"


@pytest.mark.parametrize(
    ("stop", "words"),
    [
        (("a", ""), "a stop text is empty, so the answer would end before it begins"),
        (("x" * 501,), "a stop text has 501 characters; the most is 500"),
        (tuple("abcdefghijklmnopq"), "there are 17 stop texts; the most is 16"),
    ],
)
def test_stop_texts_that_cannot_work(stop: tuple[str, ...], words: str) -> None:
    with pytest.raises(UserError) as caught:
        run([b"a"], stop=stop)
    assert caught.value.message == words
