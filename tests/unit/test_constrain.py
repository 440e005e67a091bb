"""Answers by a JSON schema: whatever a model would say, what it may say follows the schema."""

from __future__ import annotations

import importlib
import json
import queue
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mule.errors import ModelError, UserError
from mule.generate.batching import BatchEngine
from mule.generate.constrain import SchemaCompiler
from mule.generate.request import Ended, Event, Request
from mule.generate.sampler import RowSampler, Sampling
from mule.tokenizer import Tokenizer
from tests.parity.sentencepiece_kinds import KINDS, write
from tests.tiny import TINY, tiny_model

pytest.importorskip("llguidance")

TEXTS = [
    '{"name": "Ada", "age": 36, "tags": ["a", "b"], "ok": true, "where": {"x": 1.5, "y": -2}}',
    '[1, 2, 3]\n{"city": "Zürich", "note": "«ça va» 👍 \\n \\u00e9"}\n["red", "green", "blue"]',
    "The old captain said: we'll sail at 10:45, not before. " * 3,
]
POINT = {
    "type": "object",
    "properties": {"x": {"type": "integer", "minimum": -9, "maximum": 9}, "y": {"type": "number"}},
    "required": ["x", "y"],
    "additionalProperties": False,
}


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer.train(TEXTS * 3, 300)


@cache
def compiler() -> SchemaCompiler:
    return SchemaCompiler.of_tokenizer(tokenizer())


def answer(
    schema: dict[str, Any],
    seed: int,
    *,
    compiled_by: SchemaCompiler | None = None,
    of: Tokenizer | None = None,
    max_tokens: int = 2000,
    **settings: Any,
) -> list[int]:
    """Tokens of an answer by a model that gives each token a random logit at each step."""
    vocab_size = (of or tokenizer()).vocab_size
    constraint = (compiled_by or compiler()).compile(json.dumps(schema))
    request = Request((), max_tokens, Sampling(**{"temperature": 1.0, "seed": seed} | settings))
    row = RowSampler(request, vocab_size, constraint)
    random = np.random.default_rng(seed)
    ids: list[int] = []
    while not row.finished and len(ids) < max_tokens:
        ids.append(row.draw(random.normal(0, 3, vocab_size + 5).astype(np.float32)).token)
        if ids[-1] in (of or tokenizer()).stop_ids:
            ids.pop()
            break
    return ids


def is_point(value: Any) -> bool:
    """JSON bounds no exponent: a random `y` may be one that Python reads as infinity."""
    keys, numbers = list(value) == ["x", "y"], (int, float)
    return keys and type(value["x"]) is int and abs(value["x"]) <= 9 and type(value["y"]) in numbers


SCHEMAS: dict[str, tuple[dict[str, Any], Callable[[Any], bool]]] = {
    "object": (POINT, is_point),
    "array": (
        {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 5},
        lambda v: 2 <= len(v) <= 5 and all(isinstance(i, bool) for i in v),
    ),
    "enum": ({"enum": ["rouge", "weiß", 3, None]}, lambda v: v in ["rouge", "weiß", 3, None]),
    "integer": ({"type": "integer", "minimum": 100, "maximum": 131}, lambda v: 100 <= v <= 131),
    "nested": (
        {
            "type": "object",
            "properties": {
                "path": {"type": "array", "items": {"$ref": "#/$defs/point"}, "maxItems": 3},
                "kind": {"const": "route"},
            },
            "required": ["path", "kind"],
            "additionalProperties": False,
            "$defs": {"point": POINT},
        },
        lambda v: v["kind"] == "route" and all(is_point(p) for p in v["path"]),
    ),
    "string": ({"type": "string", "maxLength": 12}, lambda v: isinstance(v, str) and len(v) <= 12),
    "any of": (
        {"anyOf": [{"type": "null"}, {"type": "string", "enum": ["é", "👍"]}]},
        lambda v: v is None or v in ("é", "👍"),
    ),
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_random_logits_give_json_that_follows(name: str) -> None:
    schema, follows = SCHEMAS[name]
    texts = {tokenizer().decode(answer(schema, seed)) for seed in range(12)}
    assert len(texts) > 1
    for text in texts:
        assert follows(json.loads(text)), text


def test_greedy_answers_follow_too() -> None:
    assert is_point(json.loads(tokenizer().decode(answer(POINT, 3, temperature=0.0))))


def test_strings_may_hold_any_character() -> None:
    """Characters of several tokens come whole, and escapes are valid."""
    schema = {"type": "string", "minLength": 20, "maxLength": 30}
    values = [json.loads(tokenizer().decode(answer(schema, seed))) for seed in range(8)]
    assert all(20 <= len(value) <= 30 for value in values)
    assert any(ord(character) > 127 for value in values for character in value)


def test_an_answer_ends_when_it_is_complete() -> None:
    constraint = compiler().compile(json.dumps(POINT))
    ids = tokenizer().encode('{"x": 3, "y": 4}')
    for token in ids[:-1]:
        assert constraint.allowed()[token]
        constraint.accept(token)
        assert not constraint.finished
    constraint.accept(ids[-1])
    assert constraint.finished, "nothing can follow the last brace"


def test_a_number_may_go_on_or_end_with_a_stop_token() -> None:
    constraint = compiler().compile('{"type": "integer"}')
    for token in tokenizer().encode("12"):
        constraint.accept(token)
    allowed = constraint.allowed()
    assert not constraint.finished
    assert all(allowed[token] for token in tokenizer().stop_ids)
    assert allowed[tokenizer().encode("3")[0]] and not allowed[tokenizer().encode("x")[0]]
    constraint.accept(tokenizer().eos_id)
    assert constraint.finished


def test_special_tokens_never_stand_inside() -> None:
    constraint = compiler().compile('{"type": "string"}')
    constraint.accept(tokenizer().encode('"')[0])
    assert not constraint.allowed()[sorted(tokenizer().special_ids)].any()


def test_space_has_a_limit() -> None:
    """A model that prefers spaces comes to an end all the same."""
    constraint = compiler().compile('{"type": "object"}')
    constraint.accept(tokenizer().encode("{")[0])
    blank = [i for i in range(tokenizer().vocab_size) if tokenizer().piece(i).strip(b" \n") == b""]
    blank = [i for i in blank if i not in tokenizer().special_ids]
    num_blank = 0
    while num_blank < 60 and (allowed := [t for t in blank if constraint.allowed()[t]]):
        constraint.accept(allowed[-1])
        num_blank += 1
    assert 0 < num_blank < 60


def test_what_the_schema_leaves_no_choice_in_is_encoded_as_usual() -> None:
    constraint = compiler().compile(json.dumps({"const": "sail at 10:45"}))
    (first,) = np.flatnonzero(constraint.allowed())
    assert first == tokenizer().encode('"sail at 10:45"')[0]


def test_a_vocabulary_given_as_pieces_does_the_same() -> None:
    """As for a GGUF file: bytes of each token, without a way to encode text."""
    tok = tokenizer()
    pieces = [tok.piece(token) for token in range(tok.vocab_size)]
    by_pieces = SchemaCompiler(
        pieces, special_ids=tok.special_ids, stop_ids=frozenset(tok.stop_ids)
    )
    for seed in range(4):
        ids = answer(POINT, seed, compiled_by=by_pieces)
        assert is_point(json.loads(b"".join(pieces[token] for token in ids)))


@pytest.mark.parametrize("name", ["Llama 2", "Mistral v0.3", "Gemma"])
def test_sentencepiece_vocabularies_do_the_same(name: str, tmp_path: Path) -> None:
    """Spaces are written U+2581 in them, and rare characters as bytes."""
    write(KINDS[name], tmp_path)
    tok = Tokenizer.load(tmp_path)
    own = SchemaCompiler.of_tokenizer(tok)
    schema = {"type": "array", "items": {"type": "string", "minLength": 5, "maxLength": 9}}
    schema |= {"minItems": 2, "maxItems": 3}
    for seed in range(3):
        assert is_point(json.loads(tok.decode(answer(POINT, seed, compiled_by=own, of=tok))))
        ids = answer(schema, seed, compiled_by=own, of=tok)
        assert tok.decode(ids).encode() == b"".join(tok.piece(token) for token in ids)
        assert all(5 <= len(text) <= 9 for text in json.loads(tok.decode(ids)))
    assert [tok.piece(token) for token in tok.encode("é ☃")][-1] == b"\x83"


def test_a_model_without_a_stop_token_ends_when_nothing_can_follow() -> None:
    tok = tokenizer()
    pieces = [tok.piece(token) for token in range(tok.vocab_size)]

    def broken(text: str) -> list[int]:
        raise RuntimeError(text)

    alone = SchemaCompiler(pieces, special_ids=tok.special_ids, stop_ids=set(), encode=broken)
    assert is_point(json.loads(tok.decode(answer(POINT, 5, compiled_by=alone))))
    constraint = alone.compile('{"type": "integer"}')
    constraint.accept(tok.encode("1")[0])
    assert constraint.allowed().shape == (tok.vocab_size,)
    assert not constraint.allowed()[list(tok.stop_ids)].any()


def test_a_token_that_is_not_allowed_is_an_error() -> None:
    constraint = compiler().compile('{"type": "integer"}')
    with pytest.raises(ModelError, match="the JSON schema cannot be followed any further"):
        constraint.accept(tokenizer().encode("x")[0])


def test_random_models_answer_by_their_schemas_side_by_side() -> None:
    tok = tokenizer()
    config = replace(TINY, vocab_size=tok.vocab_size + 7, max_position_embeddings=512)
    engine = BatchEngine(tiny_model(config).eval(), tok, max_rows=4)
    texts = dict.fromkeys(SCHEMAS, "")
    events: queue.SimpleQueue[tuple[str, Event]] = queue.SimpleQueue()

    def listener(name: str) -> Callable[[Event], None]:
        return lambda event: events.put((name, event))

    try:
        for number, (name, (schema, _)) in enumerate(SCHEMAS.items()):
            sampling = Sampling(temperature=1.0, seed=number)
            request = Request((5, 6, 7), 400, sampling, schema=json.dumps(schema))
            engine.submit(request, listener(name))
        reasons: dict[str, str] = {}
        while len(reasons) < len(SCHEMAS):
            name, event = events.get(timeout=60)
            texts[name] += event.text
            if isinstance(event, Ended):
                reasons[name] = event.reason
    finally:
        engine.close()
    assert set(reasons.values()) == {"stop"}
    for name, (_, follows) in SCHEMAS.items():
        assert follows(json.loads(texts[name])), texts[name]


# ---------------------------------------------------------------- refused


def nested(depth: int) -> str:
    return '{"items": ' * depth + "{}" + "}" * depth


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ("{", "the JSON schema is not JSON: "),
        ("[" * 40_000, "the JSON schema is not JSON: nested too deeply"),
        ("[]", "the JSON schema is [], not an object"),
        (nested(60), "the JSON schema is nested 61 deep; the most is 48"),
        (
            '{"enum": ["' + "x" * 70_000 + '"]}',
            "the JSON schema has 70,014 bytes; the most is 65,536",
        ),
        ('{"x-guidance": {"lenient": true}}', "the JSON schema holds x-guidance"),
        ('{"type": "thing"}', "the JSON schema cannot be compiled: "),
        ('{"type": "string", "pattern": "(?<=a)b"}', "the JSON schema cannot be compiled: "),
        ('{"$ref": "https://example.com/a.json"}', "the JSON schema cannot be compiled: "),
        ('{"$ref": "#"}', "the JSON schema cannot be compiled: NoExtension"),
        ('{"$ref": "file:///etc/passwd"}', "the JSON schema cannot be compiled: "),
        ('{"type": "string", "format": "nonsense"}', "the JSON schema cannot be compiled: "),
        ('{"enum": ["\\ud800"]}', "the JSON schema cannot be compiled: "),
    ],
    ids=range(13),
)
def test_schemas_that_cannot_be_followed(schema: str, words: str) -> None:
    with pytest.raises(UserError) as caught:
        compiler().compile(schema)
    assert caught.value.message.startswith(words)
    assert caught.value.hint


def product_of_choices(count: int) -> dict[str, Any]:
    """2 ** count ways to combine."""
    pair = [{"properties": {"a": {"const": 1}}}, {"properties": {"b": {"const": 2}}}]
    return {"type": "object", "allOf": [{"anyOf": pair} for _ in range(count)]}


def doubling(count: int) -> dict[str, Any]:
    """Definitions that each hold the next one twice."""
    parts: dict[str, Any] = {f"d{count}": {"type": "null"}}
    for number in range(count):
        below = {"$ref": f"#/$defs/d{number + 1}"}
        parts[f"d{number}"] = {"type": "array", "prefixItems": [below, below], "minItems": 2}
    return {"$ref": "#/$defs/d0", "$defs": parts}


BOMBS = {
    "product of choices": product_of_choices(40),
    "doubling": doubling(40),
    "long string": {"type": "string", "minLength": 10**9, "maxLength": 2 * 10**9},
    "many items": {"type": "array", "items": {"type": "null"}, "minItems": 10**9},
    "pattern": {"type": "string", "pattern": "((a{1,900}){1,900}){1,900}"},
    "alternatives": {"type": "string", "pattern": "(.*a.*b.*c.*d){30}x(a|b|c|.*)*y{3000}"},
    "many keys": {"type": "object", "required": [f"k{number}" for number in range(5_000)]},
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_or_followed_in_time(name: str) -> None:
    started_at = time.process_time()
    try:
        constraint = compiler().compile(json.dumps(BOMBS[name]))
        for _ in range(20):
            constraint.accept(int(np.flatnonzero(constraint.allowed())[0]))
            if constraint.finished:
                break
    except (UserError, ModelError) as error:
        assert error.message.startswith("the JSON schema ")
    assert time.process_time() - started_at < 5


def test_without_the_extra_the_error_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(UserError) as caught:
        compiler().compile('{"type": "object"}')
    assert caught.value.hint == 'install the extra: pip install "mule[schema]"'
