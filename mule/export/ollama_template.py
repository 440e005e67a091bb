"""A chat template in the language of Ollama's Modelfiles, found by running the model's own.

Ollama before 0.30 ignores the template inside a GGUF file and wants one in Go's text/template. What
stands before and after each message is read off chats that the model's template writes; the Go
template made of it counts only if it writes other chats exactly alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from mule.errors import MuleError
from mule.export.go_template import ollama_data, render_go
from mule.tokenizer import Tokenizer

Message = dict[str, str]
_Place = Literal["own", "first", "last"]  # of a system message
_MIN_PROVEN = 3  # chats that the model's template writes, so that alike means something


def _turns(*contents: str, system: str = "") -> list[Message]:
    """Users and assistants by turns, a system message first if given."""
    roles = ("user", "assistant")
    chat = [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]
    return [{"role": "system", "content": system}, *chat] if system else chat


_ASKED, _TOLD = (
    ("mule-asks-1", "mule-says-1", "mule-asks-2", "mule-says-2", "mule-asks-3"),
    "mule-told",
)
_PROOFS = (
    _turns("a"),
    _turns("What is 1 < 2 & 3?", 'Yes.\n\nIt "is".', "{{ .Role }} {% if x %}"),
    _turns("a", "b", "c", "d", "e", "f", "Ça va ? 你好 👍"),
    _turns("user", system="system"),
    _turns("line 1\nline 2", "assistant", "c", system="You are a mule.\nBe <b>brief</b>."),
    _turns("a", "b", "c", "d", "e", system="x"),
)
_SPACED = _turns(" a \n", " b ", "\n c", system=" d\n")
_THOUGHT = _turns("a", "<think>\nhm\n</think>\n\nb", "c")


@dataclass(frozen=True)
class OllamaTemplate:
    """A Go template; `user_start` is what begins a user's turn, `notes` say where it must differ."""

    text: str
    takes_system: bool
    user_start: str
    notes: tuple[str, ...]


def takes_system(tokenizer: Tokenizer) -> bool:
    """Whether the chat template writes what a system message says."""
    text = _rendered(tokenizer, _turns(_ASKED[0], system=_TOLD))
    return text is not None and _TOLD in text


def ollama_template(tokenizer: Tokenizer) -> OllamaTemplate | None:
    """The chat template in Go's language; None where it cannot be said there exactly."""
    parts = _read_parts(tokenizer)
    text = parts.go() if parts else ""
    if parts is None or '"""' in f'{text}"':  # which ends a text in a Modelfile
        return None
    proven = 0
    for chat in _PROOFS:
        if not parts.takes_system and chat[0]["role"] == "system":
            continue
        expected = _rendered(tokenizer, chat)
        if expected is None:
            continue  # the template refuses it
        if render_go(text, ollama_data(chat)) != expected:
            return None
        proven += 1
    if proven < _MIN_PROVEN:
        return None
    return OllamaTemplate(text, parts.takes_system, parts.user[0], _notes(tokenizer, text, parts))


# ---------------------------------------------------------------- what is around the messages


@dataclass(frozen=True)
class _Parts:
    """What stands before and after the content of a message of each role.

    `absent` is written where there is no system message, `answer` is what asks for an answer. `place`:
    the system message has its own turn, or stands in the first user's, which then has no start, or in
    the last user's.
    """

    user: tuple[str, str]
    assistant: tuple[str, str]
    system: tuple[str, str] | None
    place: _Place
    absent: str
    answer: str

    @property
    def takes_system(self) -> bool:
        return self.system is not None

    def go(self) -> str:
        """The Go template; "" where a part would be read as an action."""
        texts = (*self.user, *self.assistant, *(self.system or ()), self.absent, self.answer)
        if any("{{" in text or text.endswith("{") for text in texts):
            return ""
        absent = self.absent
        if absent and self.takes_system:
            absent = f"{{{{- if not .System }}}}{absent}{{{{ end }}}}"
        if frame := self._frame():
            before, between, after = frame
            turn = f"{before}{{{{ .Role }}}}{between}{{{{ .Content }}}}{after}"
            return f"{absent}{{{{- range .Messages }}}}{turn}{{{{ end }}}}{self.answer}"
        start, after = self.user
        system = "{{ .Content }}".join(self.system) if self.system else ""
        if self.place == "first":
            start = f"{{{{ if not (and $.System (eq $i 1)) }}}}{start}{{{{ end }}}}"
        elif self.place == "last":
            told = "{{ $.System }}".join(self.system or ())
            start += (
                f"{{{{ if and $.System (eq (len (slice $.Messages $i)) 1) }}}}{told}{{{{ end }}}}"
            )
            system = ""
        each = ".Messages" if self.place == "own" else "$i, $_ := .Messages"
        return (
            f'{absent}{{{{- range {each} }}}}{{{{ if eq .Role "system" }}}}{system}'
            f'{{{{ else if eq .Role "user" }}}}{start}{{{{ .Content }}}}{after}'
            f"{{{{ else }}}}{'{{ .Content }}'.join(self.assistant)}"
            f"{{{{ end }}}}{{{{ end }}}}{self.answer}"
        )

    def _frame(self) -> tuple[str, str, str] | None:
        """What is around role and content, where turns of all roles are written alike."""
        before, found, between = self.user[0].partition("user")
        starts = (self.user[0], self.assistant[0], self.system[0] if self.system else "")
        named = tuple(f"{before}{role}{between}" for role in ("user", "assistant", "system"))
        ends = {self.user[1], self.assistant[1], self.system[1] if self.system else ""}
        alike = found and self.place == "own" and starts == named and len(ends) == 1
        return (before, between, self.user[1]) if alike else None


def _read_parts(tokenizer: Tokenizer) -> _Parts | None:
    """The parts, where the same ones stand around every message of a role."""
    long = _gaps(tokenizer, _turns(*_ASKED))
    short = _gaps(tokenizer, _turns(_ASKED[0]))
    asked = _gaps(tokenizer, _turns(_ASKED[0]), answer=False)
    answered = _gaps(tokenizer, _turns(*_ASKED[:2]), answer=False)
    if not (long and short and asked and answered):
        return None
    first, to_answer, to_question = long[:3]
    user_end = _end(tokenizer, asked[-1], to_answer, short[1])
    assistant_end = _end(tokenizer, answered[-1], to_question)
    user_start = to_question.removeprefix(assistant_end)
    if not first.endswith(user_start) and user_start.endswith(first):
        user_start = first  # the end of an answer writes bos too, for what follows
        assistant_end = to_question.removesuffix(first)
    found = _read_system(tokenizer, user_start, long)
    if found is None or not first.endswith(user_start):
        return None
    system, place = found
    return _Parts(
        user=(user_start, user_end),
        assistant=(to_answer.removeprefix(user_end), assistant_end),
        system=system,
        place=place,
        absent=first.removesuffix(user_start),
        answer=short[1].removeprefix(user_end),
    )


def _end(tokenizer: Tokenizer, last: str, *before_others: str) -> str:
    """What ends a turn: as it ends a chat, less a token that ends only chats; "" where it varies."""
    stops = (tokenizer.token_text(token) for token in tokenizer.stop_ids)
    ways = (last, *(last.removesuffix(stop) for stop in stops))
    fits = (way for way in ways if all(text.startswith(way) for text in before_others))
    return next(fits, "")


def _read_system(
    tokenizer: Tokenizer, user_start: str, long: list[str]
) -> tuple[tuple[str, str] | None, _Place] | None:
    """What is around a system message (None: it is not written), and where it stands.

    None where it stands in none of the places that are known.
    """
    if not takes_system(tokenizer):
        return None, "own"
    chat = _turns(*_ASKED, system=_TOLD)
    gaps = _gaps(tokenizer, chat)
    if gaps is not None and gaps[2:] == long[1:]:
        before, after = gaps[:2]
        if after.endswith(user_start) and user_start:
            return (before, after.removesuffix(user_start)), "own"
        return (before, after), "first"
    gaps = _gaps(tokenizer, chat, order=[*_ASKED[:-1], _TOLD, _ASKED[-1]])
    last = len(_ASKED) - 1
    if gaps is None or gaps[:last] != long[:last] or gaps[-1] != long[-1]:
        return None
    if not gaps[last].startswith(long[last]):
        return None
    return (gaps[last].removeprefix(long[last]), gaps[last + 1]), "last"


def _gaps(
    tokenizer: Tokenizer,
    chat: list[Message],
    *,
    answer: bool = True,
    order: list[str] | None = None,
) -> list[str] | None:
    """The text before, between and after the contents; None where they are not all there in order.

    `order`: that of the contents in the text, if it is another than in the chat.
    """
    text = _rendered(tokenizer, chat, answer=answer)
    if text is None:
        return None
    gaps = []
    for content in order or [message["content"] for message in chat]:
        before, found, text = text.partition(content)
        if not found:
            return None
        gaps.append(before)
    return [*gaps, text]


def _rendered(tokenizer: Tokenizer, chat: list[Message], *, answer: bool = True) -> str | None:
    """The chat without the bos that llama.cpp puts before it; None where the template refuses it."""
    try:
        text = tokenizer.render_chat(chat, add_generation_prompt=answer)
    except MuleError:
        return None
    bos = "" if tokenizer.bos_id is None else tokenizer.token_text(tokenizer.bos_id)
    return text.removeprefix(bos)


def _notes(tokenizer: Tokenizer, go: str, parts: _Parts) -> tuple[str, ...]:
    """Where the model's template does what Go's language cannot."""
    found = []
    spaced = _SPACED if parts.takes_system else _SPACED[1:]
    told = (
        (spaced, "takes white space off the ends of messages; Ollama passes them on as typed"),
        (_THOUGHT, "leaves out the thoughts of earlier answers; in Ollama they stay in the chat"),
    )
    for chat, what in told:
        expected = _rendered(tokenizer, chat)
        if expected is not None and expected != render_go(go, ollama_data(chat)):
            found.append(f"the model's chat template {what}")
    if "strftime_now" in (tokenizer.chat_template or ""):
        today = datetime.now().strftime("%Y-%m-%d")
        found.append(
            f"the chat template writes the date: in the Modelfile it stays that of {today}"
        )
    return tuple(found)
