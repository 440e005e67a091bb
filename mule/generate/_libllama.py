"""llama.cpp's C interface through ctypes; only the child process imports this.

A wrong argument here ends the process (GGML_ASSERT aborts), which is why it is never loaded into
Mule itself. Source: include/llama.h of llama.cpp b11549, the build inside xllamacpp.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import os
import statistics
import sys
import time
from collections.abc import Iterator
from ctypes import (
    POINTER,
    c_bool,
    c_char_p,
    c_float,
    c_int8,
    c_int32,
    c_int64,
    c_size_t,
    c_uint8,
    c_uint32,
    c_void_p,
)
from pathlib import Path

import numpy as np
import numpy.typing as npt

# The layout of the parameter structs changes often: it is known for this release and no other.
VERSION = "2026.10.11549"
BATCH_TOKENS = 512  # fixed: another batch size picks other kernels and gives other last digits
_F32, _F16 = 0, 1  # ggml_type
_FLASH_AUTO, _FLASH_OFF = -1, 0  # llama_flash_attn_type
_TRIALS = 3  # tokens timed for each number of threads
_WARN = 3  # ggml_log_level; 4 is error


class LibraryError(RuntimeError):
    """llama.cpp is absent, is another build, or refused a request."""


class _ModelParams(ctypes.Structure):
    _fields_ = (
        ("devices", c_void_p),
        ("tensor_buft_overrides", c_void_p),
        ("n_gpu_layers", c_int32),
        ("split_mode", c_int32),
        ("load_mode", c_int32),
        ("lazy_mode", c_int32),
        ("main_gpu", c_int32),
        ("tensor_split", c_void_p),
        ("progress_callback", c_void_p),
        ("progress_callback_user_data", c_void_p),
        ("kv_overrides", c_void_p),
        ("vocab_only", c_bool),
        ("check_tensors", c_bool),
        ("use_extra_bufts", c_bool),
        ("no_host", c_bool),
        ("no_alloc", c_bool),
        ("load_mtp", c_bool),
        ("_tail", c_uint8 * 256),
    )


class _ContextParams(ctypes.Structure):
    _fields_ = (
        ("n_ctx", c_uint32),
        ("n_batch", c_uint32),
        ("n_ubatch", c_uint32),
        ("n_seq_max", c_uint32),
        ("n_rs_seq", c_uint32),
        ("n_outputs_max", c_uint32),
        ("n_outputs_max_per_seq", c_uint32),
        ("n_threads", c_int32),
        ("n_threads_batch", c_int32),
        ("ctx_type", c_int32),
        ("rope_scaling_type", c_int32),
        ("pooling_type", c_int32),
        ("attention_type", c_int32),
        ("flash_attn_type", c_int32),
        ("rope_and_yarn", c_float * 6),
        ("yarn_orig_ctx", c_uint32),
        ("defrag_thold", c_float),
        ("cb_eval", c_void_p),
        ("cb_eval_user_data", c_void_p),
        ("type_k", c_int32),
        ("type_v", c_int32),
        ("moe_cache_size", c_size_t),
        ("abort_callback", c_void_p),
        ("abort_callback_data", c_void_p),
        ("embeddings", c_bool),
        ("offload_kqv", c_bool),
        ("no_perf", c_bool),
        ("op_offload", c_bool),
        ("swa_full", c_bool),
        ("kv_unified", c_bool),
        ("samplers", c_void_p),
        ("n_samplers", c_size_t),
        ("ctx_other", c_void_p),
        ("_tail", c_uint8 * 256),
    )


class _Batch(ctypes.Structure):
    _fields_ = (
        ("n_tokens", c_int32),
        ("token", POINTER(c_int32)),
        ("embd", POINTER(c_float)),
        ("pos", POINTER(c_int32)),
        ("n_seq_id", POINTER(c_int32)),
        ("seq_id", POINTER(POINTER(c_int32))),
        ("logits", POINTER(c_int8)),
    )


_LogCallback = ctypes.CFUNCTYPE(None, ctypes.c_int, c_char_p, c_void_p)

_SIGNATURES: dict[str, tuple[object, list[object]]] = {
    "llama_backend_init": (None, []),
    "llama_log_set": (None, [_LogCallback, c_void_p]),
    "llama_model_default_params": (_ModelParams, []),
    "llama_context_default_params": (_ContextParams, []),
    "llama_model_load_from_file": (c_void_p, [c_char_p, _ModelParams]),
    "llama_init_from_model": (c_void_p, [c_void_p, _ContextParams]),
    "llama_set_n_threads": (None, [c_void_p, c_int32, c_int32]),
    "llama_model_get_vocab": (c_void_p, [c_void_p]),
    "llama_model_n_ctx_train": (c_int32, [c_void_p]),
    "llama_model_chat_template": (c_char_p, [c_void_p, c_char_p]),
    "llama_n_ctx": (c_uint32, [c_void_p]),
    "llama_get_memory": (c_void_p, [c_void_p]),
    "llama_memory_clear": (None, [c_void_p, c_bool]),
    "llama_memory_seq_rm": (c_bool, [c_void_p, c_int32, c_int32, c_int32]),
    "llama_vocab_n_tokens": (c_int32, [c_void_p]),
    "llama_vocab_bos": (c_int32, [c_void_p]),
    "llama_vocab_eos": (c_int32, [c_void_p]),
    "llama_vocab_eot": (c_int32, [c_void_p]),
    "llama_vocab_get_add_bos": (c_bool, [c_void_p]),
    "llama_vocab_is_eog": (c_bool, [c_void_p, c_int32]),
    "llama_tokenize": (
        c_int32,
        [c_void_p, c_char_p, c_int32, POINTER(c_int32), c_int32, c_bool, c_bool],
    ),
    "llama_token_to_piece": (c_int32, [c_void_p, c_int32, c_char_p, c_int32, c_int32, c_bool]),
    "llama_batch_init": (_Batch, [c_int32, c_int32, c_int32]),
    "llama_decode": (c_int32, [c_void_p, _Batch]),
    "llama_get_logits": (POINTER(c_float), [c_void_p]),
    "ggml_quantize_init": (None, [c_int32]),
    "ggml_quantize_chunk": (
        c_size_t,
        [c_int32, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p],
    ),
}


def load_library() -> ctypes.CDLL:
    """The llama.cpp inside xllamacpp, with its functions declared.

    Raises LibraryError when the package is absent or is not the release whose structs are known.
    """
    try:
        found = importlib.metadata.version("xllamacpp")
    except importlib.metadata.PackageNotFoundError:
        raise LibraryError("the package xllamacpp is not installed") from None
    if found != VERSION:
        raise LibraryError(f"xllamacpp is {found}; Mule knows the interface of {VERSION} only")
    spec = importlib.util.find_spec("xllamacpp")
    folders = (spec.submodule_search_locations if spec else None) or []
    binaries = [file for folder in folders for file in Path(folder).glob("xllamacpp*.so")]
    if not binaries:
        raise LibraryError(f"no shared library in {', '.join(folders)}")
    library = ctypes.CDLL(str(binaries[0]))
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    library.llama_log_set(_log, None)
    return library


def num_cores() -> int:
    """Cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@_LogCallback
def _log(level: int, text: bytes, _: object) -> None:
    if level >= _WARN:
        sys.stderr.write(text.decode("utf-8", "replace"))
        sys.stderr.flush()


def quantize_rows(library: ctypes.CDLL, type_id: int, rows: npt.NDArray, out: npt.NDArray) -> None:
    """Fill `out` (rows, bytes a row) with the ggml blocks of `rows` (rows, columns) float32."""
    written = library.ggml_quantize_chunk(
        type_id, rows.ctypes.data, out.ctypes.data, 0, rows.shape[0], rows.shape[1], None
    )
    if written != out.nbytes:
        raise LibraryError(f"ggml wrote {written} bytes where {out.nbytes} were expected")


class Model:
    """A GGUF file loaded for evaluation, with one sequence in its cache.

    `exact` keeps the cache in float32 and flash attention off, on the CPU: with an f32 file the
    logits then equal those of the model it was written from to about 1e-4.
    """

    def __init__(
        self, library: ctypes.CDLL, path: str, n_ctx: int, threads: int, exact: bool
    ) -> None:
        self.library = library
        library.llama_backend_init()
        self._model = self._load(path, exact)
        self.vocab = library.llama_model_get_vocab(self._model)
        self.num_tokens: int = library.llama_vocab_n_tokens(self.vocab)
        self._context = self._open(n_ctx, exact)
        self._memory = library.llama_get_memory(self._context)
        self._batch = library.llama_batch_init(BATCH_TOKENS, 0, 1)
        self.n_ctx: int = library.llama_n_ctx(self._context)
        self.n_ctx_train: int = library.llama_model_n_ctx_train(self._model)
        self.cached: list[int] = []  # the ids whose keys and values are in the cache
        self.use_threads(threads or self._fastest())

    def _load(self, path: str, exact: bool) -> int:
        params = self.library.llama_model_default_params()
        _require_defaults(params, n_gpu_layers=-1, vocab_only=False, use_extra_bufts=True)
        params.check_tensors = True
        if exact:
            params.n_gpu_layers = 0
        if not (model := self.library.llama_model_load_from_file(path.encode(), params)):
            raise LibraryError("llama.cpp could not load the file")
        return model

    def _open(self, n_ctx: int, exact: bool) -> int:
        params = self.library.llama_context_default_params()
        known = {"n_ctx": 512, "n_batch": 2048, "n_ubatch": 512, "n_seq_max": 1}
        known |= {"flash_attn_type": _FLASH_AUTO, "type_k": _F16, "type_v": _F16}
        _require_defaults(params, **known, offload_kqv=True, op_offload=True, embeddings=False)
        params.n_ctx, params.n_batch, params.n_ubatch = n_ctx, BATCH_TOKENS, BATCH_TOKENS
        if exact:
            params.flash_attn_type = _FLASH_OFF
            params.type_k = params.type_v = _F32
            params.offload_kqv = params.op_offload = False
        if not (context := self.library.llama_init_from_model(self._model, params)):
            raise LibraryError(f"llama.cpp could not open a context of {n_ctx} tokens")
        return context

    def use_threads(self, threads: int) -> None:
        self.library.llama_set_n_threads(self._context, threads, threads)

    def _fastest(self) -> int:
        """The number of threads that decodes fastest now.

        ggml's threads wait for each other by spinning: with other work on the cores, two can be
        twenty times slower than one (measured).
        """
        seconds = {}
        for threads in {num_cores(), max(1, num_cores() // 2), 1}:
            self.use_threads(threads)
            runs = [self._seconds_a_token() for _ in range(_TRIALS)]
            seconds[threads] = statistics.median(runs)
        return min(seconds, key=lambda threads: seconds[threads])

    def _seconds_a_token(self) -> float:
        start = time.perf_counter()
        for _ in self.feed([0], every=False):
            self.forget()
        return time.perf_counter() - start

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

    def end_of_generation(self) -> list[int]:
        is_eog, vocab = self.library.llama_vocab_is_eog, self.vocab
        return [token for token in range(self.num_tokens) if is_eog(vocab, token)]

    def forget(self) -> None:
        self.library.llama_memory_clear(self._memory, True)
        self.cached = []

    def keep_prefix(self, ids: list[int]) -> None:
        """Drop from the cache what is not a common beginning with `ids`, short of its last one."""
        common = 0
        for mine, theirs in zip(self.cached, ids[:-1]):
            if mine != theirs:
                break
            common += 1
        if common == len(self.cached):
            return
        if common and self.library.llama_memory_seq_rm(self._memory, 0, common, -1):
            self.cached = self.cached[:common]
        else:
            self.forget()

    def feed(self, ids: list[int], every: bool) -> Iterator[npt.NDArray[np.float32]]:
        """Append `ids` to the cache; logits (n, vocab) a batch, of `every` position or the last."""
        for start in range(0, len(ids), BATCH_TOKENS):
            part = ids[start : start + BATCH_TOKENS]
            last = start + len(part) == len(ids)
            num_outputs = len(part) if every else int(last)
            self._decode(part, every, last)
            if num_outputs:
                pointer = self.library.llama_get_logits(self._context)
                yield np.ctypeslib.as_array(pointer, (num_outputs, self.num_tokens))

    def _decode(self, part: list[int], every: bool, last: bool) -> None:
        batch, past = self._batch, len(self.cached)
        batch.n_tokens = len(part)
        for i, token in enumerate(part):
            batch.token[i], batch.pos[i] = token, past + i
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
            batch.logits[i] = every or (last and i == len(part) - 1)
        if code := self.library.llama_decode(self._context, batch):
            self.forget()
            raise LibraryError(f"llama_decode failed with code {code}")
        self.cached += part


def _require_defaults(params: ctypes.Structure, **known: int) -> None:
    """The struct's layout is as declared: a shifted field would show another default."""
    for name, value in known.items():
        if (found := getattr(params, name)) != value:
            raise LibraryError(f"this llama.cpp has {name}={found} where {value} was expected")
