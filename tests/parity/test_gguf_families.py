"""A GGUF file of every family computes in llama.cpp what transformers computes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from mule.adapters.source import Source, load_source
from mule.commands import export
from mule.commands import verify as verify_command
from mule.export.families import FAMILIES
from mule.export.gguf import write_gguf
from mule.export.reference import TorchReference
from mule.export.verify import verify
from mule.generate.llamacpp import LlamaCpp
from tests.parity.tiny_families import MODELS, save_family
from tests.parity.tiny_gguf import PROMPTS, TEXTS, VOCAB_ROWS, tiny_tokenizer

TOKENS, CACHED_FROM = 300, 276
ROUTED = ("qwen3_moe", "granitemoeshared")


def logits(model: torch.nn.Module, ids: list[int]) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor([ids]), use_cache=False).logits[0].float().numpy()


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_transformers(tmp_path: Path, name: str) -> None:
    model = save_family(tmp_path, name)
    write_gguf(tmp_path, tmp_path / "m.gguf", "f32")
    ids = np.random.default_rng(0).integers(0, VOCAB_ROWS, TOKENS).tolist()
    expected = logits(model, ids)
    with LlamaCpp(tmp_path / "m.gguf", n_ctx=TOKENS, threads=1, exact=True) as runtime:
        used = runtime.vocab_size
        found = runtime.logits(ids)
        steps = [
            (length, next(runtime.generate(ids[:length], max_tokens=1, stop_ids=[])))
            for length in range(CACHED_FROM, TOKENS)
        ]
    assert np.abs(expected).max() > 1  # the weights are no trifle
    most = 5e-3 if "gemma" in name else 1e-3
    np.testing.assert_allclose(found, expected, atol=most)
    for length, token in steps:  # each from the cache of the one before: one token is computed
        row = expected[length - 1, :used]
        assert row[token] >= row.max() - 2 * most, f"after {length} tokens"


@pytest.mark.parametrize("family", FAMILIES)
def test_q8_0_loads_and_answers(tmp_path: Path, family: str) -> None:
    name = next(name for name, (kind, _) in MODELS.items() if kind == family)
    model = save_family(tmp_path, name)
    report = write_gguf(tmp_path, tmp_path / "m.gguf", "q8_0")
    assert report.tensor_types.keys() == {"F32", "Q8_0"} and report.fallbacks == []
    ids = tiny_tokenizer().encode("The sea was calm that morning")
    with LlamaCpp(tmp_path / "m.gguf", n_ctx=256, threads=1) as runtime:
        found = runtime.logits(ids)
        assert len(list(runtime.generate(ids, max_tokens=5, stop_ids=[]))) == 5
    errors = np.abs(found - logits(model, ids)).max(1)
    routed = family in ROUTED
    # Where two experts are about as good, a rounding error chooses: there a token is far off.
    assert (np.median(errors) if routed else errors.max()) < 0.05 * np.abs(found).max()


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(name, marks=[pytest.mark.slow] * (name not in ("llama", "gemma3_text")))
        for name in FAMILIES
    ],
)
def test_verify_passes_with_our_own_decoder(tmp_path: Path, family: str) -> None:
    name = next(name for name, (kind, _) in MODELS.items() if kind == family)
    save_family(tmp_path, name)
    write_gguf(tmp_path, tmp_path / "m.gguf", "f32")
    reference = TorchReference(*load_source(Source("tiny", model_dir=tmp_path)))
    report = verify(tmp_path / "m.gguf", reference, texts=TEXTS, prompts=PROMPTS, threads=1)
    assert report.ok, report.failures
    assert report.max_abs_logit < (5e-3 if family == "gemma3_text" else 2e-4)


@pytest.mark.slow
def test_the_commands_take_a_folder_to_a_verified_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save_family(tmp_path / "tiny", "qwen2")
    result = export.run("tiny", types=["q4_k_m", "f32"])
    assert "PARAMETER num_ctx 512" in Path(result["modelfile"]).read_text()
    assert "Q4_K -> Q5_0 in" in result["files"][0]["notes"][-1]  # 128 and 192 wide
    verified = verify_command.run(Path(result["files"][1]["file"]))
    assert verified["ok"] and verified["files"][0]["tokens_equal"]
    save_family(tmp_path / "windowed", "mistral", sliding_window=128)
    result = export.run("windowed", types=["q8_0"])
    assert "PARAMETER num_ctx 128" in Path(result["modelfile"]).read_text()
    assert "beyond 128 tokens the answers differ" in result["files"][0]["notes"][0]
