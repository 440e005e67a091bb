"""Good exports pass, and each planted fault is caught by name."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader, GGUFWriter
from safetensors.torch import load_file, save_file

from mule.errors import ModelError
from mule.export import families, gguf, logits_proof, tokens
from mule.export.gguf import write_gguf
from mule.export.limits import LIMITS, Limits
from mule.export.origin import Origin
from mule.export.quantize import Quantizer
from mule.export.verify import verify
from mule.export.verify_report import VerifyReport
from tests.parity.tiny_gguf import (
    PROMPTS,
    TEXTS,
    TorchReference,
    edit_json,
    save_tiny,
    tiny_tokenizer,
)

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {"tie_word_embeddings": True, "head_dim": 128},
    "llama-biases": {
        "attention_bias": True,
        "mlp_bias": True,
        "rope_parameters": LLAMA3_ROPE,
        "num_key_value_heads": 1,
    },
}
# Random weights are nearly uniform, which exaggerates what quantising does: looser there only.
RANDOM_LIMITS = {
    "q8_0": Limits(2e-3, 5e-3, 0.02),
    "q6_k": Limits(1e-2, 2e-2, 0.04),
    "q5_k_m": Limits(4e-2, 8e-2, 0.1),
    "q5_k_s": Limits(4e-2, 8e-2, 0.1),
    "q4_k_m": Limits(1e-1, 2e-1, 0.2),
    "q4_k_s": Limits(1e-1, 2e-1, 0.2),
    "iq4_xs": Limits(2e-1, 4e-1, 0.4),
    "q3_k_m": Limits(4e-1, 8e-1, 0.9),
    "q2_k": Limits(1.5, 3.0, 3.0),
}
Tiny = tuple[Path, TorchReference]
STEPS = "structure metadata tensors weights tokens template stops distributions greedy".split()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tiny]:
    models = {}
    for name, changes in MODELS.items():
        folder = tmp_path_factory.mktemp(name)
        model = save_tiny(folder, name.partition("-")[0], **changes)
        models[name] = (folder, TorchReference(model, tiny_tokenizer()))
    return models


# The types that are tried in `make test`; tests/parity/test_good_exports.py tries trained models.
QUICK = {"llama": ("f32", "f16", "q4_k_m"), "qwen3": ("bf16", "q8_0"), "llama-biases": ("f32",)}


def check(file: Path, reference: TorchReference, **options: Any) -> VerifyReport:
    return verify(file, reference, texts=TEXTS, prompts=PROMPTS, threads=1, **options)


# ---------------------------------------------------------------- good files


@pytest.mark.parametrize(
    ("name", "type_name"),
    [
        pytest.param(name, kind, marks=[] if kind in quick else pytest.mark.slow)
        for name, quick in QUICK.items()
        for kind in LIMITS
        if kind != "mxfp4"  # of mixtures only
    ],
)
def test_a_good_export_passes(
    tiny: dict[str, Tiny], tmp_path: Path, name: str, type_name: str
) -> None:
    folder, reference = tiny[name]
    file = tmp_path / f"{type_name}.gguf"
    written = write_gguf(folder, file, type_name)
    limits = RANDOM_LIMITS.get(type_name)
    report = check(file, reference, limits=limits, origin=Origin(folder))
    assert report.ok, report.failures
    assert report.tokens_equal and report.template_equal and report.stops
    assert [check.name for check in report.checks] == STEPS and report.runtime == "llama.cpp"
    assert all(check.ok for check in report.checks) and report.unchecked == []
    assert report.weights is not None and report.weights["identical_blocks"] == 1
    assert report.tokens_per_second > 0 and report.reference_tokens_per_second > 0
    assert report.num_texts >= 500 and report.num_tokens >= 200
    assert report.size_bytes == written.size_bytes == file.stat().st_size
    assert written.fallbacks == [] and len(written.notes) == 1
    assert "of the model's 619 embedding rows belong to no token" in written.notes[0]
    if type_name == "f32":
        assert report.max_abs_logit < 1e-4 and report.greedy_equal and report.top1 == 1
    if type_name == "f16":
        assert report.kl_mean < 2e-6 and all(margin < 1e-2 for margin in report.greedy_margins)


@pytest.mark.slow
def test_more_bits_are_nearer(tiny: dict[str, Tiny], tmp_path: Path) -> None:
    folder, reference = tiny["llama"]
    figures = []
    for type_name in ("q8_0", "q6_k", "q5_k_m", "q4_k_m"):
        file = tmp_path / f"{type_name}.gguf"
        bits = write_gguf(folder, file, type_name).bits_per_weight
        report = verify(
            file, reference, texts=TEXTS[:1], limits=RANDOM_LIMITS[type_name], threads=1
        )
        figures.append((bits, report.kl_mean))
    bits, kl = zip(*figures)
    assert list(bits) == sorted(bits, reverse=True) and bits[0] < 8.6 and bits[-1] < 5
    assert list(kl) == sorted(kl)


def test_report_is_a_json_object(tiny: dict[str, Tiny], tmp_path: Path) -> None:
    folder, reference = tiny["qwen3"]
    write_gguf(folder, tmp_path / "m.gguf", "f16")
    values = json.loads(json.dumps(check(tmp_path / "m.gguf", reference).as_dict()))
    assert values["ok"] is True and values["type"] == "f16"
    assert values["file"] == str(tmp_path / "m.gguf")
    assert values["verdict"] == "f16: same perplexity, same answers on 2 of 2 prompts: fine"
    for name in ("kl_mean", "kl_p99", "top1", "ppl_reference", "ppl", "max_abs_logit"):
        assert isinstance(values[name], float)
    for name in ("tokens_equal", "stops", "template_equal", "greedy_equal"):
        assert isinstance(values[name], bool)
    assert values["num_prompts"] == 2 and values["failures"] == []
    unmeasured = VerifyReport("m.gguf", "f16", 1, 16.0, failures=["x: y"]).as_dict()
    assert unmeasured["kl_mean"] is None and unmeasured["ok"] is False
    assert unmeasured["tokens_equal"] is None and unmeasured["ppl_change"] is None
    assert unmeasured["verdict"] == "not the same model: x: y"


def test_rows_that_k_quants_cannot_hold_fall_back_and_are_named(tmp_path: Path) -> None:
    model = save_tiny(tmp_path, "qwen3", hidden_size=96, intermediate_size=300, num_hidden_layers=1)
    report = write_gguf(tmp_path, tmp_path / "m.gguf", "q4_k_m")
    assert "blk.0.attn_q.weight: rows of 96, Q4_K -> Q5_0" in report.fallbacks
    assert "blk.0.ffn_down.weight: rows of 300, Q6_K -> F16" in report.fallbacks
    assert "output.weight: rows of 96, Q6_K -> Q8_0" in report.fallbacks
    assert "blk.0.attn_output.weight" not in "".join(report.fallbacks)  # rows of 256
    assert report.notes[-1].startswith(
        f"{len(report.fallbacks)} of {sum(report.tensor_types.values())} tensors have rows (96, 300) "
        "that do not divide into blocks, and take larger types: Q4_K -> Q5_0 in "
    )
    found = check(
        tmp_path / "m.gguf",
        TorchReference(model, tiny_tokenizer()),
        limits=RANDOM_LIMITS["q4_k_m"],
    )
    assert found.ok, found.failures


def test_metadata_and_sharded_weights(tiny: dict[str, Tiny], tmp_path: Path) -> None:
    folder, reference = tiny["llama"]
    reference.model.save_pretrained(tmp_path, max_shard_size="3MB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(folder / file, tmp_path)
    extra = {"license": "apache-2.0", "mule.run": "demo", "name": "Tiny"}
    write_gguf(tmp_path, tmp_path / "m.gguf", "bf16", metadata=extra)
    write_gguf(folder, tmp_path / "one.gguf", "bf16", metadata=extra)
    assert (tmp_path / "m.gguf").read_bytes() == (tmp_path / "one.gguf").read_bytes()
    reader = GGUFReader(tmp_path / "m.gguf")
    values = {key: reader.fields[key].contents() for key in reader.fields}
    assert values["general.name"] == "Tiny" and values["general.license"] == "apache-2.0"
    assert values["mule.run"] == "demo" and values["general.architecture"] == "llama"
    assert values["llama.rope.freq_base"] == 30_000.0
    assert values["tokenizer.ggml.eos_token_id"] == tiny_tokenizer().eos_id


def test_native_and_numpy_files_run_alike(
    tiny: dict[str, Tiny], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, reference = tiny["llama"]

    def absent(subject: str) -> None:
        raise ModelError("the package xllamacpp is not installed")

    monkeypatch.setattr("mule.export.quantize.Runtime", absent)
    report = write_gguf(folder, tmp_path / "m.gguf", "q4_k_m")
    assert report.notes[1:] == [
        "blocks made by NumPy, not by llama.cpp: the package xllamacpp is not installed"
    ]
    found = check(tmp_path / "m.gguf", reference, limits=RANDOM_LIMITS["q4_k_m"])
    assert found.ok, found.failures


# ---------------------------------------------------------------- planted faults


def failures(file: Path, reference: TorchReference, limits: Limits | None = None) -> dict[str, str]:
    """The failures by name."""
    report = check(file, reference, limits=limits)
    assert not report.ok
    assert report.verdict == f"not the same model: {report.failures[0]}"
    found: dict[str, str] = {}
    for failure in report.failures:
        found.setdefault(failure.partition(":")[0], failure)
    return found


def copied(folder: Path, tmp_path: Path) -> Path:
    shutil.copytree(folder, tmp_path / "copy", ignore=shutil.ignore_patterns("*.gguf"))
    return tmp_path / "copy"


def test_unpermuted_heads_are_caught(
    tiny: dict[str, Tiny], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, reference = tiny["llama"]
    wrong = dataclasses.replace(families.FAMILIES["llama"], permuted=False)
    monkeypatch.setitem(families.FAMILIES, "llama", wrong)
    write_gguf(folder, tmp_path / "m.gguf", "f16")
    found = failures(tmp_path / "m.gguf", reference)
    assert "it is attention: RoPE base, order of the q and k rows" in found["kl_mean"]
    write_gguf(folder, tmp_path / "m.gguf", "q4_k_m")
    assert "kl_mean" in failures(tmp_path / "m.gguf", reference, RANDOM_LIMITS["q4_k_m"])


def test_permuted_heads_of_qwen3_are_caught(
    tiny: dict[str, Tiny], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, reference = tiny["qwen3"]
    wrong = dataclasses.replace(families.FAMILIES["qwen3"], permuted=True)
    monkeypatch.setitem(families.FAMILIES, "qwen3", wrong)
    write_gguf(folder, tmp_path / "m.gguf", "bf16")
    assert "it is attention" in failures(tmp_path / "m.gguf", reference)["kl_mean"]


def test_a_wrong_rope_base_is_caught(tiny: dict[str, Tiny], tmp_path: Path) -> None:
    folder, reference = tiny["qwen3"]
    copy = copied(folder, tmp_path)
    edit_json(copy / "config.json", rope_parameters={"rope_type": "default", "rope_theta": 20_000})
    write_gguf(copy, tmp_path / "m.gguf", "f32")
    found = failures(tmp_path / "m.gguf", reference)
    assert "it is attention" in found["kl_mean"]
    assert "at most 0.001" in found["max_abs_logit"]


def test_missing_rope_factors_are_caught(
    tiny: dict[str, Tiny], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, reference = tiny["llama-biases"]

    def without_factors(model_dir: Path) -> Any:
        family, shape = families.read_shape(model_dir)
        return family, dataclasses.replace(shape, rope=dataclasses.replace(shape.rope, factors={}))

    monkeypatch.setattr(gguf, "read_shape", without_factors)
    write_gguf(folder, tmp_path / "m.gguf", "f32")
    assert "it is attention" in failures(tmp_path / "m.gguf", reference)["kl_mean"]


def test_other_weights_are_caught(tiny: dict[str, Tiny], tmp_path: Path) -> None:
    """As when the base is exported in place of the merged model."""
    folder, reference = tiny["llama"]
    copy = copied(folder, tmp_path)
    weights = load_file(copy / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    down, up = torch.randn(512, 2), torch.randn(2, 256)
    weights[name] += 0.02 * down @ up  # a small adapter of rank 2
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    write_gguf(copy, tmp_path / "m.gguf", "f16")
    found = failures(tmp_path / "m.gguf", reference)
    assert "already the first tokens differ: other weights, norms or head" in found["kl_mean"]


def test_a_wrong_norm_epsilon_is_caught(tiny: dict[str, Tiny], tmp_path: Path) -> None:
    folder, reference = tiny["llama"]
    copy = copied(folder, tmp_path)
    edit_json(copy / "config.json", rms_norm_eps=1e-2)
    write_gguf(copy, tmp_path / "m.gguf", "f16")
    assert "kl_mean" in failures(tmp_path / "m.gguf", reference)


def test_a_wrong_end_of_text_is_caught(
    tiny: dict[str, Tiny], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, reference = tiny["llama"]
    right = tokens.read_tokens
    monkeypatch.setattr(
        gguf, "read_tokens", lambda *a: dataclasses.replace(right(*a), eos_id=300, bos_id=300)
    )
    write_gguf(folder, tmp_path / "m.gguf", "f32")
    found = failures(tmp_path / "m.gguf", reference)
    assert "the file's eos is token 300; the model stops at token 2" in found["stops"]


def test_a_stop_token_that_does_not_stop_is_caught(tiny: dict[str, Tiny], tmp_path: Path) -> None:
    folder, reference = tiny["llama"]
    write_gguf(folder, tmp_path / "m.gguf", "f32")
    prompt = tiny_tokenizer().encode_prompt(PROMPTS[0])
    answer = reference.greedy(prompt, 64)
    other = TorchReference(reference.model, _StopsAt(answer[3]))
    found = failures(tmp_path / "m.gguf", other)
    assert (
        f"token {answer[3]} (" in found["stops"] and "does not end a generation" in found["stops"]
    )
    assert f"the file goes on after token {answer[3]}" in str(check(tmp_path / "m.gguf", other))


class _StopsAt:
    """The tiny tokenizer, stopping at one more token."""

    def __init__(self, token: int) -> None:
        self._inner = tiny_tokenizer()
        self.stop_ids = (*self._inner.stop_ids, token)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def _cut_as(table: tokens.TokenTable, pre: str) -> tokens.TokenTable:
    return dataclasses.replace(table, splitting=dataclasses.replace(table.splitting, pre=pre))


def test_a_wrong_pre_tokenizer_is_caught(
    tiny: dict[str, Tiny], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, reference = tiny["qwen3"]
    right = tokens.read_tokens
    monkeypatch.setattr(gguf, "read_tokens", lambda *a: _cut_as(right(*a), "qwen2"))
    write_gguf(folder, tmp_path / "m.gguf", "f32")
    found = failures(tmp_path / "m.gguf", reference)
    assert "texts get other ids" in found["tokens"]
    assert "tokenizer.ggml.pre" in found["tokens"]


def test_another_chat_template_is_caught(tiny: dict[str, Tiny], tmp_path: Path) -> None:
    folder, reference = tiny["llama"]
    copy = copied(folder, tmp_path)
    template = (copy / "chat_template.jinja").read_text()
    (copy / "chat_template.jinja").write_text(template.replace("assistant", "model"))
    write_gguf(copy, tmp_path / "m.gguf", "f32")
    found = failures(tmp_path / "m.gguf", reference)
    assert "<|im_start|>model" in found["template"] and "<|im_start|>assistant" in found["template"]


def test_a_cut_file_fails(tiny: dict[str, Tiny], tmp_path: Path) -> None:
    folder, reference = tiny["llama"]
    file = tmp_path / "m.gguf"
    write_gguf(folder, file, "f16")
    file.write_bytes(file.read_bytes()[: file.stat().st_size * 3 // 4])
    report = check(file, reference)
    assert report.failures[0].startswith("structure: cut short: tensor 'blk.")
    assert report.verdict.startswith("not the same model: structure: cut short")
    assert (report.type, report.tokens_equal, report.weights) == ("unknown", None, None)
    with pytest.raises(ModelError, match="no such file"):
        check(tmp_path / "other.gguf", reference)


def test_a_file_that_llama_cpp_refuses_fails(tiny: dict[str, Tiny], tmp_path: Path) -> None:
    folder, reference = tiny["llama"]
    file = tmp_path / "m.gguf"
    write_gguf(folder, file, "q8_0")
    content = bytearray(file.read_bytes())
    content[-3400:] = b"\xff" * 3400  # scales that are NaN
    file.write_bytes(content)
    report = check(file, reference, origin=Origin(folder))
    assert re.match(r"weights: NaN in [\d,]+ places where the model holds", report.failures[0])
    assert report.failures[1].startswith("runtime: llama.cpp could not load the file")


def test_a_file_of_another_type_needs_limits(tmp_path: Path, tiny: dict[str, Tiny]) -> None:
    file = tmp_path / "m.gguf"
    writer = GGUFWriter(str(file), "llama")
    writer.add_file_type(2)
    writer.add_tensor("token_embd.weight", np.ones((3, 5), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelError, match="a file of file_type 2 has no limits of its own"):
        check(file, tiny["llama"][1])


# ---------------------------------------------------------------- writing


def test_float16_overflow_leaves_no_file(tiny: dict[str, Tiny], tmp_path: Path) -> None:
    copy = copied(tiny["llama"][0], tmp_path)
    weights = load_file(copy / "model.safetensors")
    weights["lm_head.weight"][4, 7] = 1e5
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lm_head\.weight holds 1e\+05; float16 ends") as error:
        write_gguf(copy, tmp_path / "out" / "m.gguf", "f16")
    assert "--type bf16" in error.value.hint
    assert list((tmp_path / "out").iterdir()) == []
    write_gguf(copy, tmp_path / "out" / "m.gguf", "bf16")


def test_a_write_that_does_not_read_back_is_refused(
    tiny: dict[str, Tiny], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = Quantizer.write

    def flipped(self: Quantizer, file: Path, tensors: Any, done: Any) -> Any:
        sums = right(self, file, tensors, done)
        place = next(t.offset for t in tensors if t.name == "blk.0.ffn_gate.weight")
        content = bytearray(file.read_bytes())
        content[place + 3] ^= 1
        file.write_bytes(content)
        return sums

    monkeypatch.setattr(Quantizer, "write", flipped)
    with pytest.raises(ModelError, match=r"blk\.0\.ffn_gate\.weight was not read back"):
        write_gguf(tiny["llama"][0], tmp_path / "m.gguf", "f32")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors is missing"),
        (
            lambda folder: (folder / "model.safetensors").write_bytes(b"nonsense" * 99),
            "not a readable safetensors file",
        ),
        (
            lambda folder: edit_json(folder / "config.json", intermediate_size=513),
            "mlp.gate_proj.weight has shape (512, 256), config.json says (513, 256)",
        ),
        (
            lambda folder: edit_json(folder / "config.json", num_hidden_layers=4),
            "9 weights are missing, first model.layers.3.input_layernorm.weight",
        ),
    ],
)
def test_a_folder_that_does_not_fit_is_refused(
    tiny: dict[str, Tiny], tmp_path: Path, spoil: Any, message: str
) -> None:
    copy = copied(tiny["llama"][0], tmp_path)
    spoil(copy)
    with pytest.raises(ModelError) as error:
        write_gguf(copy, tmp_path / "m.gguf", "f16")
    assert message in error.value.message and error.value.hint
    assert not (tmp_path / "m.gguf").exists()


def test_an_unknown_type_lists_the_known(tiny: dict[str, Tiny], tmp_path: Path) -> None:
    with pytest.raises(ModelError) as error:
        write_gguf(tiny["llama"][0], tmp_path / "m.gguf", "q1_0")
    assert error.value.message == "no GGUF type 'q1_0'"
    assert error.value.hint == f"choose among {', '.join(LIMITS)}"


def test_prompts_beyond_the_time_are_not_asked(
    tiny: dict[str, Tiny], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, reference = tiny["llama"]
    write_gguf(folder, tmp_path / "m.gguf", "f32")
    monkeypatch.setattr(logits_proof, "_ANSWERS_SECONDS", 0.0)
    report = check(tmp_path / "m.gguf", reference)
    assert report.ok and report.num_prompts == 1
    assert report.notes[-1] == "1 of 2 prompts were asked: 0 seconds were over"


def test_an_untrained_model_is_judged_by_its_weights(tiny: dict[str, Tiny], tmp_path: Path) -> None:
    """Its distributions after quantising are far away, and that says nothing."""
    folder, reference = tiny["qwen3"]
    write_gguf(folder, tmp_path / "m.gguf", "q2_k")
    report = check(tmp_path / "m.gguf", reference, origin=Origin(folder))
    assert report.ok and report.trained is False and report.unchecked == ["distributions"]
    assert report.uniformity > 0.9 and report.kl_mean > LIMITS["q2_k"].kl_mean / 10
    (told,) = [each.detail for each in report.checks if each.ok is None]
    assert re.match(
        r"the model is untrained: its predictions have 9\d% of the entropy of gue", told
    )
