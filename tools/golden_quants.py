"""Record what llama.cpp's own quantiser makes of tests/parity/golden_models.py.

    python -m tools.golden_quants FOLDER "node-llama-cpp 3.22.1, llama.cpp v0.5.0"

FOLDER holds a native build's libllama and libggml, such as `package/bins/linux-x64` of
`npm pack @node-llama-cpp/linux-x64`. Each model is written as f32 by our writer, quantised by
`llama_model_quantize`, and a hash of each tensor goes into tests/parity/golden_quants.json.
"""

from __future__ import annotations

import ctypes
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from mule import fsio
from mule.export.gguf import write_gguf
from mule.export.mixtures import TYPES as MIXTURES
from tests.parity.golden_models import MODELS, RECORD, tensor_record, types_of, write_golden_model


class _Params(ctypes.Structure):
    """The beginning of llama_model_quantize_params, which has not moved for years, and room."""

    _fields_ = (
        ("nthread", ctypes.c_int32),
        ("ftype", ctypes.c_int32),
        ("_rest", ctypes.c_uint8 * 504),
    )


class Native:
    """A native build of llama.cpp; no other one may be in this process."""

    def __init__(self, folder: Path) -> None:
        base, ggml, self._llama = (
            ctypes.CDLL(str(_library(folder, name)), mode=os.RTLD_NOW | ctypes.RTLD_GLOBAL)
            for name in ("ggml-base", "ggml", "llama")
        )
        ggml.ggml_backend_load_all_from_path.argtypes = [ctypes.c_char_p]
        ggml.ggml_backend_load_all_from_path(str(folder).encode())
        self._llama.llama_backend_init()
        self._llama.llama_model_quantize_default_params.restype = _Params
        self._llama.llama_model_quantize.argtypes = [
            ctypes.c_char_p,
            ctypes.c_char_p,
            ctypes.POINTER(_Params),
        ]
        for name in ("ggml_version", "ggml_commit"):
            getattr(base, name).restype = ctypes.c_char_p
        self.version = f"ggml {base.ggml_version().decode()} ({base.ggml_commit().decode()})"

    def quantize(self, source: Path, out: Path, file_type: int, threads: int = 1) -> None:
        params = self._llama.llama_model_quantize_default_params()
        params.nthread, params.ftype = threads, file_type
        code = self._llama.llama_model_quantize(
            str(source).encode(), str(out).encode(), ctypes.byref(params)
        )
        if code != 0:
            raise SystemExit(f"llama_model_quantize answered {code} for {source}")


def _library(folder: Path, name: str) -> Path:
    found = sorted(folder.glob(f"lib{name}.*so*")) or sorted(folder.glob(f"lib{name}.*dylib"))
    if not found:
        raise SystemExit(f"{folder}: no lib{name}")
    return found[0].resolve()


def main(folder: Path, name: str) -> None:
    """Write the record; `name` says where the build comes from."""
    native = Native(folder)
    models: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        for model in MODELS:
            place = Path(temporary) / model
            write_golden_model(place, model)
            write_gguf(place, place / "f32.gguf", "f32")
            made = {"f32": tensor_record(place / "f32.gguf")}
            for kind in types_of(model):
                out = place / f"{kind}.gguf"
                native.quantize(place / "f32.gguf", out, int(MIXTURES[kind][1]))
                made[kind] = tensor_record(out)
            names = list(made["f32"])
            models[model] = {
                "tensors": names,
                **{kind: [found[name] for name in names] for kind, found in made.items()},
            }
    fsio.write_json(RECORD, {"made_by": f"{name}, {native.version}", "models": models})


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
