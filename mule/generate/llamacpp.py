"""Running a GGUF file in llama.cpp, in a child process that cannot take Mule down."""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, TypedDict, Unpack

import numpy as np
import numpy.typing as npt

from mule.errors import ModelError
from mule.generate.gguf_header import GgufHeader, read_header
from mule.generate.gguf_memory import cache_tokens
from mule.generate.llamacpp_process import DAMAGED_HINT, Runtime
from mule.generate.llamacpp_templates import Templates
from mule.generate.llamacpp_wire import event_of, request_fields
from mule.generate.request import Request, Token
from mule.generate.sampler import Sampling

_NORMAL, _UNKNOWN, _CONTROL, _UNUSED, _BYTE = 1, 2, 3, 5, 6  # llama_token_type
_MAX_DEFAULT_CONTEXT = 4096
# llama.cpp finds in general.name, and nowhere else, that special tokens take the white space after
# them; these do not. Source: llama_vocab::impl::load in src/llama-vocab.cpp, b11549.
EATS_SPACES_NAME = re.compile(r"phi-?3", re.IGNORECASE)
EATS_NO_SPACES = frozenset({"<unk>", "<s>", "<|endoftext|>"})
_SPACES = " \t\n\v\f\r"
_DEFAULT_MAX_TOKENS = 256


class GenerateOptions(TypedDict, total=False):
    """As in Sampling, but for a `seed` of None, which is another each time.

    `max_tokens` is 256 if not given, and `stop_ids` the file's own.
    """

    max_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repeat_penalty: float
    presence_penalty: float
    frequency_penalty: float
    seed: int | None
    stop_ids: Sequence[int] | None


class LlamaCpp(Runtime):
    """A GGUF file in llama.cpp: `with LlamaCpp(file) as model: model.logits(ids)`.

    `n_ctx`: the tokens of one conversation; None takes the model's own, up to 4096.
    `threads`: None takes the number that is fastest at this moment.
    `exact` keeps the cache in float32 with flash attention off: the gate of an f32 file.
    `num_rows`: requests that `mule.generate.llamacpp_batching` answers together.
    `chats`: its template will be needed, and is made ready meanwhile.
    `reason` says why the last generation ended: stop (at `stop_id`), length or context.

    Raises ModelError when the file is damaged, when the context does not fit into the memory, or
    when llama.cpp refuses the file or crashes on it.
    """

    def __init__(
        self,
        gguf_path: Path | str,
        *,
        n_ctx: int | None = None,
        threads: int | None = None,
        exact: bool = False,
        num_rows: int = 1,
        pass_fds: Sequence[int] = (),
        chats: bool = False,
    ) -> None:
        self.header = read_header(gguf_path)
        self.n_ctx = n_ctx or self._default_context()
        num_cells = cache_tokens(self.header, self.n_ctx, num_rows, exact=exact)
        self._templates = Templates(self.header, at_once=chats)
        super().__init__(str(gguf_path), pass_fds=pass_fds)
        try:
            info, _ = self.request(
                "load",
                path=str(Path(gguf_path).resolve()),
                n_ctx=num_cells,
                num_rows=num_rows,
                threads=threads or 0,
                exact=exact,
                context_tokens=self.n_ctx,
                vocab_size=_num_used(self.header),
            )
        except BaseException:
            self.close()
            raise
        self.num_tokens: int = info["num_tokens"]
        self.n_ctx_train: int = info["n_ctx_train"]
        self.bos_id: int | None = _token(info["bos"])
        self.eos_id: int | None = _token(info["eos"])
        self.eot_id: int | None = _token(info["eot"])
        self.add_bos: bool = info["add_bos"]
        self.stop_ids = frozenset[int](info["eog"])
        self.chat_template: str | None = info["chat_template"]
        self.vocab_size: int = info["vocab_size"]  # rows beyond are never drawn
        self.reason = ""
        self.stop_id: int | None = None

    def tokenize(self, text: str, special: bool) -> list[int]:
        """Ids of `text`; `special` recognises control tokens spelled in it. No bos is added."""
        return self.tokenize_all([text], special)[0]

    def tokenize_all(
        self, texts: Sequence[str], special: bool, add_bos: bool = False
    ) -> list[list[int]]:
        """`tokenize` for many texts at once; `add_bos` puts what the file puts before a text.

        Pieces that llama.cpp joined to a control token although it is not `special` come apart.
        """
        answer, _ = self.request(
            "tokenize", texts=list(texts), add_special=add_bos, parse_special=special
        )
        if special or add_bos or not self._joined:
            return answer["ids"]
        return [[part for i in ids for part in self._joined.get(i, (i,))] for ids in answer["ids"]]

    def without_leading_spaces(self, text: str, special: bool) -> str:
        """`text` less spaces at its beginning and, if they are `special`, after control tokens."""
        if special:
            text = re.sub(f"({self._control_pattern.pattern}) +", r"\1", text)
        return text.lstrip(" ")

    def token_piece(self, token: int) -> bytes:
        """The bytes of one token; a control token gives its spelling."""
        return self.request("piece", id=token)[1]

    def is_eog(self, token: int) -> bool:
        """Whether llama.cpp ends a generation at this token."""
        return token in self.stop_ids

    def logits(self, ids: Sequence[int]) -> npt.NDArray[np.float32]:
        """Logits (n, vocab) float32 after each of `ids`, from an empty cache."""
        self._require_room(ids)
        _, data = self.request("logits", ids=list(ids))
        return np.frombuffer(data, np.float32).reshape(len(ids), self.num_tokens)

    def log_probabilities(self, ids: Sequence[int], start: int = 1) -> list[float]:
        """The natural logarithm of the probability of each of ids[start:] behind those before it."""
        self._require_room(ids)
        answer, _ = self.request("log_probabilities", ids=list(ids), start=max(1, start))
        return answer["log_probabilities"]

    def use_adapter(self, gguf_path: Path | str, scale: float = 1.0) -> None:
        """Compute from now on with a GGUF adapter on the file, `scale` times; only with this one."""
        read_header(gguf_path)
        self.request("adapter", path=str(Path(gguf_path).resolve()), scale=scale)

    def generate(self, ids: Sequence[int], **options: Unpack[GenerateOptions]) -> Iterator[int]:
        """The ids drawn after `ids`, without the stop token; `reason` tells how it ended.

        What `ids` shares with the former call is not computed again.
        """
        chosen: dict[str, Any] = {**options}
        if chosen.get("seed") is None:
            chosen["seed"] = secrets.randbits(63)
        stop_ids = chosen.pop("stop_ids", None)
        request = Request(
            tuple(ids),
            max_tokens=chosen.pop("max_tokens", _DEFAULT_MAX_TOKENS),
            stop_ids=None if stop_ids is None else frozenset(stop_ids),
            sampling=Sampling(**chosen),
        )
        self._require_room(ids)
        self.reason = ""
        self.request("start", request=request_fields(request))
        while not self.reason:
            answer, _ = self.request("next")
            for event in map(event_of, answer["events"]):
                if isinstance(event, Token):
                    yield event.id
                elif event.reason == "failed":
                    raise ModelError(f"{self.subject}: {event.error}", DAMAGED_HINT)
                else:
                    self.reason, self.stop_id = event.reason, answer["stop"]

    def apply_template(
        self, messages: Sequence[dict[str, Any]], *, add_generation_prompt: bool = True
    ) -> str:
        """The conversation as llama.cpp's own Jinja writes it with the file's template.

        A leading bos is left out where llama.cpp adds it while tokenizing (`add_bos`).
        Raises ModelError when it fails, never ends or writes without end.
        """
        return self._templates.render(messages, add_generation_prompt=add_generation_prompt)

    def close(self) -> None:
        """End the child, and that of the templates."""
        super().close()
        self._templates.close()

    def encode_prompt(self, messages: Sequence[dict[str, Any]]) -> list[int]:
        """The ids a model is given to answer `messages`; control tokens typed in them stay text."""
        pattern = self._control_pattern
        typed = "".join(str(message["content"]) for message in messages)
        if not pattern.search(typed):
            text = self.apply_template(messages)
            return self.tokenize_all([text], special=True, add_bos=True)[0]
        mark = next(c for c in map(chr, range(0xE000, 0xF900)) if c not in typed)

        def broken(content: str) -> str:
            return pattern.sub(lambda match: mark.join(match[0]), content)

        text = self.apply_template([m | {"content": broken(m["content"])} for m in messages])
        ids = self.tokenize_all([""], special=True, add_bos=True)[0]
        end, eaten = 0, ""
        for match in (*pattern.finditer(text), None):  # llama.cpp itself cuts at control tokens
            start = match.start() if match else len(text)
            plain = text[end:start].replace(mark, "").lstrip(eaten)
            ids += self.tokenize(plain, special=False)
            if match:
                ids += self.tokenize(match[0], special=True)
                end, eaten = match.end(), self._eaten_after(match[0])
        return ids

    def _eaten_after(self, token: str) -> str:
        name = str(self.header.metadata.get("general.name"))
        eats = EATS_SPACES_NAME.search(name) and token not in EATS_NO_SPACES
        return _SPACES if eats else ""

    @cached_property
    def _joined(self) -> dict[int, tuple[int, int]]:
        """The two pieces that make a control token's text, in a file that ranks pieces by score.

        Such a vocabulary builds whatever is a token, `</s>` of a user's text too.
        """
        metadata = self.header.metadata
        if metadata.get("tokenizer.ggml.model") != "llama":
            return {}
        tokens, scores = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.scores"]
        kinds = metadata["tokenizer.ggml.token_type"]
        pieces = {text: i for i, text in enumerate(tokens) if kinds[i] in (_NORMAL, _BYTE)}
        joined = {}
        for index, text in enumerate(tokens):
            cuts = [(text[:cut], text[cut:]) for cut in range(1, len(text))]
            ways = [(pieces[a], pieces[b]) for a, b in cuts if a in pieces and b in pieces]
            if kinds[index] in (_CONTROL, _UNKNOWN) and ways:
                joined[index] = max(ways, key=lambda way: min(scores[i] for i in way))
        return joined

    @cached_property
    def _control_pattern(self) -> re.Pattern[str]:
        tokens = self.header.metadata["tokenizer.ggml.tokens"]
        kinds = self.header.metadata["tokenizer.ggml.token_type"]
        texts = [text for text, kind in zip(tokens, kinds) if kind in (_CONTROL, _UNKNOWN)]
        texts.sort(key=lambda text: -len(text))
        return re.compile("|".join(map(re.escape, texts)) or r"(?!)")

    def _default_context(self) -> int:
        metadata = self.header.metadata
        length = metadata.get(f"{metadata.get('general.architecture')}.context_length")
        known = isinstance(length, int) and 0 < length < _MAX_DEFAULT_CONTEXT
        return length if known else _MAX_DEFAULT_CONTEXT

    def _require_room(self, ids: Sequence[int]) -> None:
        if not 0 < len(ids) <= self.n_ctx:
            raise ModelError(
                f"{self.subject}: {len(ids)} tokens, and the context holds {self.n_ctx}",
                f"give between 1 and {self.n_ctx} tokens, or open the file with a larger n_ctx",
            )
        if not all(0 <= token < self.num_tokens for token in ids):
            raise ModelError(
                f"{self.subject}: a token id outside 0..{self.num_tokens - 1}",
                "use the tokenizer that belongs to this file",
            )


def _num_used(header: GgufHeader) -> int:
    """Tokens up to the last that is not UNUSED: what pads the vocabulary comes after.

    0 where the file does not say.
    """
    types = header.metadata.get("tokenizer.ggml.token_type")
    if not isinstance(types, list):
        return 0
    used = [index for index, kind in enumerate(types) if kind != _UNUSED]
    return used[-1] + 1 if used else 0


def _token(value: int) -> int | None:
    return value if value >= 0 else None
