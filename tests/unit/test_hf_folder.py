"""A folder for transformers: what it opens gives the trained model's logits."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mule import fsio
from mule.adapters.source import Source, load_source
from mule.commands import export, export_hf
from mule.errors import CheckFailed, UserError
from mule.export import hf_folder
from mule.export.hf_folder import parse_size
from mule.export.merge_weights import plan_merge, write_merged
from mule.models.folder import load_model, weight_files
from mule.models.tensor_file import stored_tensors
from tests.merge_case import MergeCase, make_case
from tests.unit.memory_use import peak_bytes

IDS = torch.tensor([[3, 17, 29, 5, 61, 2, 44], [8, 80, 31, 7, 12, 9, 70]])


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> MergeCase:
    return make_case(tmp_path_factory.mktemp("hf"))


@torch.no_grad()
def in_transformers(folder: Path) -> torch.Tensor:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(IDS).logits


@torch.no_grad()
def trained(source: Source) -> torch.Tensor:
    return load_source(source)[0](IDS)


def shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of weights of at most 20 kB, which no user would ask for."""
    monkeypatch.setattr(hf_folder, "parse_size", lambda _text: 20_000)


def test_a_model_is_what_transformers_opens(
    case: MergeCase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards(monkeypatch)
    out = tmp_path / "hf"
    report = export_hf.run(str(case.base), out=out)
    torch.testing.assert_close(
        in_transformers(out), trained(Source("a", model_dir=case.base)), atol=1e-4, rtol=0
    )
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = weight_files(out)
    assert [file.name for file in files] == report["files"] and len(files) > 3
    assert index["metadata"]["total_size"] == report["size_bytes"]
    sizes = [sum(t.num_bytes for t in stored_tensors(file)) for file in files]
    assert sum(sizes) == report["size_bytes"] and min(sizes[:-1]) > 0
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    chat = [{"role": "user", "content": "a cat"}]
    theirs = AutoTokenizer.from_pretrained(out).apply_chat_template(chat, tokenize=False)
    assert theirs == "<|im_start|>user\na cat<|im_end|>\n"
    fsio.verify_folder(out)
    subprocess.run(["sha256sum", "-c", "--quiet", "SHA256SUMS"], cwd=out, check=True)
    assert "model-00002-of" in (out / "SHA256SUMS").read_text()
    assert "library_name: transformers" in (out / "README.md").read_text()


def test_an_adapter_is_merged_on_the_way(case: MergeCase, tmp_path: Path) -> None:
    source, out = case.source, tmp_path / "hf"
    report = export_hf.run(str(case.adapter), base=str(case.base), out=out)
    torch.testing.assert_close(in_transformers(out), trained(source), atol=1e-4, rtol=0)
    assert "logits within" in report["verdict"] and report["files"] == ["model.safetensors"]
    assert not (out / "model.safetensors.index.json").exists()  # of a base in several files
    again = export_hf.run(str(case.adapter), base=str(case.base), out=out, dtype="bf16")
    assert again["dtype"] == "bf16"
    assert json.loads((out / "export.json").read_text())["files"][0]["type"] == "bf16"


def test_bf16_is_half_the_size_and_near(case: MergeCase, tmp_path: Path) -> None:
    whole = export_hf.run(str(case.base), out=tmp_path / "a")
    half = export_hf.run(str(case.base), out=tmp_path / "b", dtype="bf16")
    assert half["size_bytes"] * 2 == whole["size_bytes"] and half["dtype"] == "bf16"
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    assert config["torch_dtype"] == "bfloat16"
    rounded = load_model(case.base, dtype=torch.bfloat16).float().eval()
    with torch.no_grad():
        torch.testing.assert_close(in_transformers(tmp_path / "b"), rounded(IDS), atol=1e-4, rtol=0)


def test_one_weight_is_in_memory_at_a_time(tmp_path: Path) -> None:
    case = make_case(tmp_path)
    plan = plan_merge(case.base, {}, tied=False, dtype="bf16", shard_bytes=10**9)
    (tmp_path / "out").mkdir()
    peak = peak_bytes(lambda: write_merged(plan, tmp_path / "out"))
    largest = max(t.num_bytes for tensors in plan.files.values() for t in tensors)
    assert peak < 8 * largest + 2**20


def test_a_folder_that_is_not_the_model_is_refused(
    case: MergeCase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoilt(plan: object, folder: Path) -> None:
        write_merged(plan, folder)  # type: ignore[arg-type]
        file = weight_files(folder)[-1]
        content = bytearray(file.read_bytes())
        content[-400:] = bytes(400)
        file.write_bytes(content)

    monkeypatch.setattr(hf_folder, "write_merged", spoilt)
    with pytest.raises(CheckFailed, match="gives logits that are off by"):
        export_hf.run(str(case.base), out=tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_other_folders_stay_as_they_are(case: MergeCase, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("x")
    with pytest.raises(UserError, match="exists and is no export of Mule's"):
        export_hf.run(str(case.base), out=tmp_path / "mine")
    with pytest.raises(UserError, match="lie in one another"):
        export_hf.run(str(case.base), out=case.base / "hf")


def test_sizes_are_read() -> None:
    assert [parse_size(text) for text in ("5GB", "1.5 mb", "2GiB", "900M")] == [
        *(5 * 10**9, 1_500_000, 2 * 2**30, 900_000_000),
    ]
    for text in ("5", "GB", "1KB", "-1GB", "5TB"):
        with pytest.raises(UserError, match="is no size of a file"):
            parse_size(text)


@pytest.mark.parametrize(
    ("form", "option", "told"),
    [
        ("--types", {"dtype": "bf16"}, "--dtype has no effect on GGUF files of a model"),
        ("--types", {"base_gguf": Path("a")}, "--base-gguf has no effect on GGUF files"),
        ("--hf", {"types": ["q8_0"]}, "--types has no effect with --hf"),
        ("--hf", {"system": "a"}, "--system has no effect with --hf"),
        ("--adapter-only", {"shard_size": "1GB"}, "--shard-size has no effect with --adapter-only"),
    ],
)
def test_an_option_of_another_form_is_an_error(
    form: str, option: dict[str, object], told: str
) -> None:
    with pytest.raises(UserError, match=told):
        export.run_as(form, "anything", option)
