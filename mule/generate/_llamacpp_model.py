"""A GGUF file in llama.cpp, with the rows of its cache; only the child process imports this."""

from __future__ import annotations

import ctypes
import math
import time
from collections.abc import Iterator, Sequence
from ctypes import c_float, c_int32, c_void_p

import numpy as np
import numpy.typing as npt

from mule.generate._libllama import LibraryError, num_cores, require_defaults

BATCH_TOKENS = 512  # fixed: another batch size picks other kernels and gives other last digits
_F32, _F16 = 0, 1  # ggml_type
_FLASH_AUTO, _FLASH_OFF = -1, 0  # llama_flash_attn_type
_TRIALS = 2  # tokens timed for each number of threads

# A row of the cache, the ids to append to it, and of how many of the last the logits are wanted.
Part = tuple[int, list[int], int]


class Model:
    """A GGUF file loaded for evaluation.

    `num_rows` sequences share a cache of `n_ctx` tokens; `cached` holds the ids of each.
    `exact` keeps the cache in float32 and flash attention off, on the CPU: with an f32 file the
    logits then equal those of the model it was written from to about 1e-4.
    """

    def __init__(
        self,
        library: ctypes.CDLL,
        path: str,
        *,
        n_ctx: int,
        threads: int,
        exact: bool,
        num_rows: int = 1,
    ) -> None:
        self.library = library
        library.llama_backend_init()
        self._model = self._load(path, exact)
        self.vocab = library.llama_model_get_vocab(self._model)
        self.num_tokens: int = library.llama_vocab_n_tokens(self.vocab)
        self._context = self._open(n_ctx, num_rows, exact)
        self._memory = library.llama_get_memory(self._context)
        self._batch = library.llama_batch_init(BATCH_TOKENS, 0, 1)
        self.n_ctx: int = library.llama_n_ctx(self._context)
        self.n_ctx_train: int = library.llama_model_n_ctx_train(self._model)
        # A recurrent state is of a whole sequence: it cannot be cut or taken over in part.
        self.has_state: bool = library.llama_model_is_recurrent(
            self._model
        ) or library.llama_model_is_hybrid(self._model)
        self.cached: list[list[int]] = [[] for _ in range(num_rows)]
        self._adapters: dict[str, int] = {}  # by their files
        self.use_threads(threads or self._fastest())

    def _load(self, path: str, exact: bool) -> int:
        params = self.library.llama_model_default_params()
        require_defaults(params, n_gpu_layers=-1, vocab_only=False, use_extra_bufts=True)
        params.check_tensors = True
        if exact:
            params.n_gpu_layers = 0
        if not (model := self.library.llama_model_load_from_file(path.encode(), params)):
            raise LibraryError("llama.cpp could not load the file")
        return model

    def _open(self, n_ctx: int, num_rows: int, exact: bool) -> int:
        params = self.library.llama_context_default_params()
        known = {"n_ctx": 512, "n_batch": 2048, "n_ubatch": 512, "n_seq_max": 1}
        known |= {"flash_attn_type": _FLASH_AUTO, "type_k": _F16, "type_v": _F16}
        known |= {"swa_full": True, "kv_unified": False}
        require_defaults(params, **known, offload_kqv=True, op_offload=True, embeddings=False)
        params.n_ctx, params.n_batch, params.n_ubatch = n_ctx, BATCH_TOKENS, BATCH_TOKENS
        params.n_seq_max = num_rows
        params.kv_unified = num_rows > 1  # one pool: rows of any length, and shared beginnings
        if exact:
            params.flash_attn_type = _FLASH_OFF
            params.type_k = params.type_v = _F32
            params.offload_kqv = params.op_offload = False
        if not (context := self.library.llama_init_from_model(self._model, params)):
            raise LibraryError(f"llama.cpp could not open a context of {n_ctx} tokens")
        return context

    def use_adapter(self, path: str, scale: float) -> None:
        """Put a GGUF adapter onto the model, `scale` times; it replaces the one before."""
        if path not in self._adapters:
            found = self.library.llama_adapter_lora_init(self._model, path.encode())
            if not found:
                raise LibraryError("llama.cpp could not put the adapter onto this file")
            self._adapters[path] = found
        adapters, scales = (c_void_p * 1)(self._adapters[path]), (c_float * 1)(scale)
        if self.library.llama_set_adapters_lora(self._context, adapters, 1, scales):
            raise LibraryError("llama.cpp could not use the adapter")
        self.forget()

    # ------------------------------------------------------------ threads

    def use_threads(self, threads: int) -> None:
        self.library.llama_set_n_threads(self._context, threads, threads)

    def _fastest(self) -> int:
        """The number of threads that decodes fastest now.

        ggml's threads wait for each other by spinning: with other work on the cores, two can be
        twenty times slower than one (measured). Fewer are tried only while they are faster.
        """
        best, best_s = 1, math.inf
        for threads in sorted({num_cores(), max(1, num_cores() // 2), 1}, reverse=True):
            self.use_threads(threads)
            if best_s == math.inf:
                self._seconds_a_token()  # reads the file in
            seconds = min(self._seconds_a_token() for _ in range(_TRIALS))
            if seconds >= best_s:
                break
            best, best_s = threads, seconds
        return best

    def _seconds_a_token(self) -> float:
        start = time.perf_counter()
        self.step([(0, [0], 1)])
        self.forget()
        return time.perf_counter() - start

    # ------------------------------------------------------------ vocabulary

    @property
    def chat_template(self) -> str | None:
        text = self.library.llama_model_chat_template(self._model, None)
        return text.decode("utf-8", "replace") if text else None

    def tokenize(self, text: str, add_special: bool, parse_special: bool) -> list[int]:
        data = text.encode()
        room = len(data) + 16
        while True:
            ids = (c_int32 * room)()
            count = self.library.llama_tokenize(
                self.vocab, data, len(data), ids, room, add_special, parse_special
            )
            if count >= 0:
                return ids[:count]
            room = -count

    def piece(self, token: int) -> bytes:
        """The bytes of one token; a control token gives its spelling."""
        room = 64
        while True:
            buffer = ctypes.create_string_buffer(room)
            count = self.library.llama_token_to_piece(self.vocab, token, buffer, room, 0, True)
            if count >= 0:
                return buffer.raw[:count]
            room = -count

    def is_control(self, token: int) -> bool:
        """Whether a token marks something and is no text."""
        return self.library.llama_vocab_is_control(self.vocab, token)

    def end_of_generation(self) -> list[int]:
        is_eog, vocab = self.library.llama_vocab_is_eog, self.vocab
        return [token for token in range(self.num_tokens) if is_eog(vocab, token)]

    # ------------------------------------------------------------ cache

    def forget(self) -> None:
        """Empty every row of the cache."""
        self.library.llama_memory_clear(self._memory, True)
        self.cached = [[] for _ in self.cached]

    def cut(self, row: int, length: int) -> int:
        """Drop what follows the first `length` ids of a row; the number of ids left.

        0 where the row has a recurrent state, which cannot go back.
        """
        cached = self.cached[row]
        if length >= len(cached):
            return len(cached)
        if not length or not self.library.llama_memory_seq_rm(self._memory, row, length, -1):
            self.library.llama_memory_seq_rm(self._memory, row, -1, -1)
            length = 0
        del cached[length:]
        return length

    def share(self, source: int, row: int, length: int) -> None:
        """Give the empty `row` the first `length` ids of `source`, without copying their cache."""
        self.library.llama_memory_seq_cp(self._memory, source, row, 0, length)
        self.cached[row] = self.cached[source][:length]

    # ------------------------------------------------------------ evaluation

    def feed(self, ids: list[int]) -> Iterator[npt.NDArray[np.float32]]:
        """Append `ids` to row 0; the logits (n, vocab) of every position, a batch at a time."""
        for start in range(0, len(ids), BATCH_TOKENS):
            part = ids[start : start + BATCH_TOKENS]
            yield self.step([(0, part, len(part))])

    def step(self, parts: Sequence[Part]) -> npt.NDArray[np.float32]:
        """Append ids to rows, at most BATCH_TOKENS in all; the wanted logits (n, vocab) in order.

        They are llama.cpp's own memory, valid until the next step.
        """
        batch, place, num_outputs = self._batch, 0, 0
        for row, ids, num_wanted in parts:
            past = len(self.cached[row])
            for i, token in enumerate(ids):
                batch.token[place], batch.pos[place] = token, past + i
                batch.n_seq_id[place], batch.seq_id[place][0] = 1, row
                batch.logits[place] = i >= len(ids) - num_wanted
                place += 1
            num_outputs += num_wanted
        batch.n_tokens = place
        if code := self.library.llama_decode(self._context, batch):
            self.forget()
            raise LibraryError(f"llama_decode failed with code {code}")
        for row, ids, _ in parts:
            self.cached[row] += ids
        if not num_outputs:
            return np.empty((0, self.num_tokens), np.float32)
        pointer = self.library.llama_get_logits(self._context)
        return np.ctypeslib.as_array(pointer, (num_outputs, self.num_tokens))
