"""What a client asks: the fields of a chat or a completion, checked before an engine sees them."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, replace
from typing import Any

from mule.data.sources.row import type_name
from mule.generate.answer import MAX_STOP_CHARACTERS, MAX_STOPS
from mule.generate.request import Engine, Request
from mule.generate.sampler import MAX_TOP_LOGPROBS, Sampling
from mule.serve.answer_schema import schema_of
from mule.serve.fields import Fields
from mule.serve.limits import Limits
from mule.serve.problem import Problem

_SAMPLING = (
    *("temperature", "top_p", "top_k", "min_p", "repeat_penalty"),
    *("presence_penalty", "frequency_penalty", "seed"),
)
_COMMON = (
    *("model", "max_tokens", "n", "stop", "stream", "stream_options", "response_format"),
    *("logprobs", *_SAMPLING),
)
# Taken and without effect: they change nothing of an answer.
HARMLESS = (
    *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"),
    "prompt_cache_retention",
)
CHAT_FIELDS = ("messages", "max_completion_tokens", "top_logprobs", *_COMMON)
TEXT_FIELDS = ("prompt", *_COMMON)
# Taken with the value that means nothing, refused with any other.
_IDLE: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "echo": (False,),
    "suffix": ("",),
    "best_of": (1,),
}
_TEMPLATE = "the model's own template is the only one"
_NO_GRAMMAR = "a grammar or regular expression of a request is not compiled; use response_format"
REFUSED = {
    "tools": "tools are not called here; describe them in a message",
    "functions": "tools are not called here; describe them in a message",
    "tool_choice": "tools are not called here",
    "logit_bias": "logits are not changed by token",
    "modalities": "text only",
    "audio": "text only",
    "echo": "the prompt is not repeated",
    "suffix": "text is continued, not filled in",
    "best_of": "use n",
    "chat_template": _TEMPLATE,
    "chat_template_kwargs": _TEMPLATE,
    "add_generation_prompt": _TEMPLATE,
    "grammar": _NO_GRAMMAR,
    "regex": _NO_GRAMMAR,
    "guided_grammar": _NO_GRAMMAR,
    "guided_regex": _NO_GRAMMAR,
    "guided_json": _NO_GRAMMAR,
    "json_schema": _NO_GRAMMAR,
    "structured_outputs": _NO_GRAMMAR,
    "reasoning_effort": "this model has no such dial",
    "web_search_options": "nothing is fetched",
}


@dataclass(frozen=True)
class Asked:
    """A request as it was checked; `sampling` holds the fields that were given."""

    fields: Fields
    sampling: Sampling
    stop: tuple[str, ...]
    n: int
    top_logprobs: int | None
    schema: str | None
    stream: bool
    include_usage: bool

    def max_tokens(self, engine: Engine, limits: Limits) -> int:
        """How long an answer may be: as asked, else what is left of the context up to a cap."""
        names = [name for name in ("max_completion_tokens", "max_tokens") if name in self.fields]
        asked = {name: self.fields.whole(name, 1, engine.context_tokens) for name in names}
        if len(set(asked.values())) > 1:
            raise self.fields.wrong("max_tokens", "differs from max_completion_tokens; give one")
        return asked[names[0]] or 1 if names else limits.default_max_tokens

    def requests(self, prompts: list[list[int]], engine: Engine, limits: Limits) -> list[Request]:
        """One for each answer: n of each prompt, with a seed of its own each."""
        max_tokens = self.max_tokens(engine, limits)
        if len(prompts) * self.n > limits.answers:
            raise self.fields.wrong(
                "n", f"makes {len(prompts) * self.n} answers; at most {limits.answers} at once"
            )
        found = []
        for ids in prompts:
            room = engine.context_tokens - len(ids)
            if room < 1:
                raise Problem(
                    400,
                    f"the prompt has {len(ids):,} tokens; the context holds "
                    f"{engine.context_tokens:,}, the answer included; shorten the prompt",
                    code="context_length_exceeded",
                )
            if not ids:
                raise Problem(400, "the prompt is empty; give at least one token")
            found += [self._request(ids, min(max_tokens, room), k) for k in range(self.n)]
        return found

    def _request(self, ids: list[int], max_tokens: int, number: int) -> Request:
        seed = (self.sampling.seed + number) % 2**64
        return Request(
            ids=tuple(ids),
            max_tokens=max_tokens,
            sampling=replace(self.sampling, seed=seed),
            stop=self.stop,
            top_logprobs=self.top_logprobs,
            schema=self.schema,
        )


def read_chat(body: dict[str, Any], engine: Engine, limits: Limits) -> Asked:
    """The fields of /v1/chat/completions, but for `model` and `messages`."""
    fields = _known(body, CHAT_FIELDS)
    top = fields.whole("top_logprobs", 0, MAX_TOP_LOGPROBS)
    wants = fields.flag("logprobs")
    if top is not None and not wants:
        raise fields.wrong("top_logprobs", "needs logprobs: true")
    return _read(fields, engine, limits, (top or 0) if wants else None)


def read_text(body: dict[str, Any], engine: Engine, limits: Limits) -> Asked:
    """The fields of /v1/completions, but for `model` and `prompt`."""
    fields = _known(body, TEXT_FIELDS)
    return _read(fields, engine, limits, fields.whole("logprobs", 0, MAX_TOP_LOGPROBS))


def _known(body: dict[str, Any], known: tuple[str, ...]) -> Fields:
    idle = {
        name
        for name, values in _IDLE.items()
        if any(type(body.get(name)) is type(value) and body[name] == value for value in values)
    }
    fields = Fields({name: value for name, value in body.items() if name not in idle})
    fields.allow((*known, *HARMLESS), REFUSED)
    return fields


def _read(fields: Fields, engine: Engine, limits: Limits, top_logprobs: int | None) -> Asked:
    stream = fields.flag("stream")
    options = fields.group("stream_options")
    if options is not None:
        options.allow(("include_usage", "include_obfuscation"))
        if not stream:
            raise fields.wrong("stream_options", "needs stream: true")
    return Asked(
        fields=fields,
        sampling=_sampling(fields, engine),
        stop=_stops(fields),
        n=fields.whole("n", 1, limits.answers) or 1,
        top_logprobs=top_logprobs,
        schema=schema_of(fields),
        stream=stream,
        include_usage=options is not None and options.flag("include_usage"),
    )


def _sampling(fields: Fields, engine: Engine) -> Sampling:
    """OpenAI's defaults: temperature 1 and the whole vocabulary; another seed each time."""
    given: dict[str, Any] = {
        "temperature": fields.number("temperature", 0, 2),
        "top_p": fields.number("top_p", 0, 1, beyond_low=True),
        "top_k": fields.whole("top_k", 0, engine.vocab_size),
        "min_p": fields.number("min_p", 0, 0.999),
        "repeat_penalty": fields.number("repeat_penalty", 0.1, 10),
        "presence_penalty": fields.number("presence_penalty", -2, 2),
        "frequency_penalty": fields.number("frequency_penalty", -2, 2),
        "seed": fields.whole("seed", -(2**63), 2**64 - 1),
    }
    chosen = {name: value for name, value in given.items() if value is not None}
    defaults: dict[str, Any] = {"temperature": 1.0, "seed": secrets.randbelow(2**32)}
    return Sampling(**(defaults | chosen))


def _stops(fields: Fields) -> tuple[str, ...]:
    value = fields.raw("stop")
    stops = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(stops, list) or not all(isinstance(text, str) for text in stops):
        raise fields.wrong("stop", "must be a string or a list of strings")
    if len(stops) > MAX_STOPS:
        raise fields.wrong("stop", f"holds {len(stops):,} texts; at most {MAX_STOPS} are read")
    if any(not 0 < len(text) <= MAX_STOP_CHARACTERS for text in stops):
        raise fields.wrong("stop", f"must be texts of 1 to {MAX_STOP_CHARACTERS} characters")
    return tuple(stops)


# ---------------------------------------------------------------- what is to be continued


def messages_of(asked: Asked, limits: Limits) -> list[dict[str, str]]:
    """The messages as the template takes them: a role and a text each."""
    messages = asked.fields.raw("messages")
    if not isinstance(messages, list) or not messages:
        raise asked.fields.wrong(
            "messages", 'must be a list such as [{"role": "user", "content": "Hello"}]'
        )
    if len(messages) > limits.messages:
        raise asked.fields.wrong(
            "messages", f"holds {len(messages):,} messages; at most {limits.messages:,} are read"
        )
    found = [_message(message, number) for number, message in enumerate(messages)]
    _check_size(sum(len(message["content"]) for message in found), "messages", limits)
    return found


_ROLES = {role: role for role in ("system", "user", "assistant", "tool")} | {"developer": "system"}


def _message(message: Any, number: int) -> dict[str, str]:
    where = f"messages[{number}]"
    if not isinstance(message, dict):
        raise Problem(400, f"{where} is {type_name(message)}, not an object", param=where)
    fields = Fields(message, f"{where}.")
    fields.allow(
        ("role", "content", "refusal", "tool_call_id", "annotations"),
        {"tool_calls": "tools are not called here", "name": "the template has no place for it"},
    )
    role = fields.text("role", 32) or ""
    if role not in _ROLES:
        raise fields.wrong("role", f"must be one of {', '.join(_ROLES)}")
    return {"role": _ROLES[role], "content": _content(fields)}


def _content(fields: Fields) -> str:
    """A string, or the texts of a list of text parts on lines of their own."""
    content = fields.raw("content")
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        raise fields.wrong("content", f"is {type_name(content)}; it must be a text")
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            raise fields.wrong(
                "content", "must be texts: images, audio and files are not read, nothing is fetched"
            )
        texts.append(part.get("text"))
        if not isinstance(texts[-1], str):
            raise fields.wrong("content", 'has a part without a text: {"type": "text", "text": ..}')
    return "\n".join(texts)


def prompts_of(asked: Asked, engine: Engine, limits: Limits) -> list[str | list[int]]:
    """What /v1/completions continues: a text, or ids, or a list of either."""
    fields, value = asked.fields, asked.fields.raw("prompt")
    prompts = value if isinstance(value, list) else [value]
    if prompts is value and value and all(isinstance(item, int) for item in value):
        prompts = [value]
    if not 0 < len(prompts) <= limits.answers:
        raise fields.wrong("prompt", f"must be 1 to {limits.answers} texts or lists of ids")
    for prompt in prompts:
        if isinstance(prompt, list):
            if not all(type(i) is int and 0 <= i < engine.vocab_size for i in prompt):
                raise fields.wrong("prompt", f"has ids outside 0 to {engine.vocab_size - 1:,}")
        elif not isinstance(prompt, str):
            raise fields.wrong("prompt", f"is {type_name(prompt)}; it must be a text or ids")
    _check_size(sum(len(prompt) for prompt in prompts), "prompt", limits)
    return prompts


def _check_size(num_chars: int, param: str, limits: Limits) -> None:
    if num_chars > limits.text_chars:
        raise Problem(
            400,
            f"{param} has {num_chars:,} characters; at most {limits.text_chars:,} are read",
            param=param,
        )
