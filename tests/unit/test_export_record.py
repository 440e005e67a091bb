"""What an export says of itself: in its files, its card and its sums, and nothing of the machine."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from mule import fsio
from mule.commands import export, export_adapter, export_hf
from mule.export.about import public_lineage
from mule.export.record import read_record, record_checks, source_of
from mule.generate.gguf_header import read_header
from tests.merge_case import save_adapter, save_base

COMMIT = "5" * 40
CARD = """---
license: other
license_name: tiny-licence
license_link: https://example.org/terms
language:
- en
- fr
---
# Tiny
"""
SECRET = "hf_canary123"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The home of a user called alice, with a hub model in the cache and a run on it."""
    home = tmp_path_factory.mktemp("users") / "alice"
    base = home / "hub" / "models--org--tiny" / "snapshots" / COMMIT
    save_base(base, shard_bytes=10**9)
    (base / "README.md").write_text(CARD)
    (base / "LICENSE").write_text("Terms.\n")
    run = home / "work" / "runs" / "lora"
    save_adapter(run / "checkpoint-00000003", base)
    lineage = {
        "mule": "0.1.0",
        "machine": {"cpu": "alice's"},
        "sources": [{"file": f"{home}/data/chats.jsonl", "bytes": 9, "sha256": "a" * 64}],
        "base": {"path": "org/tiny", "revision": COMMIT, "sha256": {"weights": "b"}},
    }
    fsio.write_json(run / "lineage.json", lineage)
    return home


@pytest.fixture(scope="module")
def exported(home: Path) -> dict[str, Any]:
    """All three forms, each source named by its whole path."""
    source = str(home / "work" / "runs" / "lora" / "checkpoint-00000003")
    base = str(home / "hub" / "models--org--tiny" / "snapshots" / COMMIT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(home))
        patch.setenv("HF_TOKEN", SECRET)
        patch.chdir(home / "work")
        files = export.run(source, types=["f32"], base=base, author="Somebody")
        export.run(base, types=["f32"], name="tiny")
        adapter = export_adapter.run(source, base=base)
        hf = export_hf.run(source, base=base)
    return {"gguf": files, "adapter": adapter, "hf": hf}


def test_no_file_names_the_user_or_holds_a_secret(home: Path, exported: dict[str, Any]) -> None:
    root = home / "work" / "exports"
    files = [file for file in root.rglob("*") if file.is_file() and file.suffix != ".lock"]
    assert len(files) > 30
    for file in files:
        if file.name == "lineage.json" and file.parent.name == "merged":
            continue  # of a folder that is not passed on: where its run is
        content = file.read_bytes()
        for word in (b"alice", str(home.parent).encode(), SECRET.encode()):
            assert word not in content, file


def test_the_file_says_where_it_comes_from(home: Path, exported: dict[str, Any]) -> None:
    metadata = read_header(home / "work" / "exports" / "lora" / "lora-F32.gguf").metadata
    lineage = fsio.read_json(home / "work" / "runs" / "lora" / "lineage.json")
    told = {key: value for key, value in metadata.items() if key.startswith("general.")}
    assert told == {
        "general.architecture": "qwen3",
        "general.type": "model",
        "general.name": "lora",
        "general.author": "Somebody",
        "general.license": "other",
        "general.base_model.count": 1,
        "general.base_model.0.name": "tiny",
        "general.base_model.0.organization": "org",
        "general.base_model.0.version": COMMIT,
        "general.base_model.0.repo_url": "https://huggingface.co/org/tiny",
        "general.tags": ["mule", "text-generation"],
        "general.languages": ["en", "fr"],
        "general.size_label": told["general.size_label"],
        "general.file_type": 0,
    }
    assert told["general.size_label"].endswith("K")
    assert metadata["mule.lineage"] == fsio.sha256_json(lineage)
    assert len(metadata["mule.weights"]) == 64
    base = read_header(home / "work" / "exports" / "tiny" / "tiny-F32.gguf").metadata
    assert "mule.lineage" not in base and base["mule.weights"] != metadata["mule.weights"]


def test_the_card_tells_it_too(home: Path, exported: dict[str, Any]) -> None:
    folder = home / "work" / "exports" / "lora"
    card = (folder / "README.md").read_text()
    head, _, body = card.removeprefix("---\n").partition("---\n")
    assert head.splitlines() == [
        *("license: other", "license_name: tiny-licence"),
        *("license_link: https://example.org/terms", "language: [en, fr]"),
        *("base_model: org/tiny", "base_model_relation: finetune"),
        *("library_name: gguf", "pipeline_tag: text-generation", "tags: [mule]"),
    ]
    assert "**org/tiny (revision 555555555555)**, fine-tuned, in GGUF files" in body
    assert "| `lora-F32.gguf` | f32 | " in body and "| not yet (`mule verify`) |" in body
    assert f"- data: `chats.jsonl`, 0.00 MB, SHA-256 `{'a' * 64}`" in body
    assert "Its terms lie here as they came with the base: `LICENSE`" in body
    record_checks(folder, {"lora-F32.gguf": {"ok": True, "verdict": "f32: fine"}})
    assert "| f32: fine |" in (folder / "README.md").read_text()
    of_base = (home / "work" / "exports" / "tiny" / "README.md").read_text()
    assert "base_model_relation: quantized" in of_base and "## Training" not in of_base
    of_adapter = (folder / "adapter" / "README.md").read_text()
    assert "base_model_relation: adapter" in of_adapter
    assert "| the same adapter: on tiny-F32.gguf logits within" in of_adapter


def test_the_sums_can_be_checked_anywhere(
    home: Path, exported: dict[str, Any], tmp_path: Path
) -> None:
    for name in ("lora", "lora/adapter", "lora/hf", "tiny"):
        copied = shutil.copytree(
            home / "work" / "exports" / name, tmp_path / name.replace("/", "-")
        )
        subprocess.run(["sha256sum", "-c", "--quiet", "SHA256SUMS"], cwd=copied, check=True)


def test_the_way_back_to_the_model_leads_past_no_user(
    home: Path, exported: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    exports = home / "work" / "exports"

    def source(name: str) -> Any:
        return json.loads((exports / name / "export.json").read_text())["source"]

    assert source("lora") == "merged" and source("tiny") == f"hf://org/tiny@{COMMIT}"
    assert source("lora/adapter") == "../../../runs/lora/checkpoint-00000003"
    record = read_record(exports / "lora" / "adapter")
    assert record is not None
    found = source_of(exports / "lora" / "adapter", record)
    assert found == str(home / "work" / "runs" / "lora" / "checkpoint-00000003")
    assert source_of(exports / "lora" / "adapter", record | {"source": "../gone"}) is None


def test_older_files_of_other_weights_are_no_part_of_it(
    home: Path, exported: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder, base = tmp_path / "out", save_base(tmp_path / "base", shard_bytes=10**9)
    export.run(str(base), types=["f32"], out=folder, name="a")
    record_checks(folder, {"a-F32.gguf": {"ok": True, "verdict": "fine"}})
    export.run(str(base), types=["f32", "f16"], out=folder, name="a")
    entries = read_record(folder)["files"]  # type: ignore[index]
    checked = {entry["file"]: "check" in entry for entry in entries}
    assert checked == {"a-F32.gguf": True, "a-F16.gguf": False}, "the same bytes stay verified"
    other = save_base(tmp_path / "other", seed=2, shard_bytes=10**9)
    export.run(str(other), types=["f16"], out=folder, name="a")
    assert [entry["file"] for entry in read_record(folder)["files"]] == ["a-F16.gguf"]  # type: ignore[index]
    assert "a-F32.gguf" not in (folder / "SHA256SUMS").read_text()


def test_a_lineage_is_told_by_names() -> None:
    told = public_lineage(
        {
            "run": "/home/alice/runs/a",
            "machine": {},
            "base": {"path": "/home/alice/b", "sha256": "c"},
        }
    )
    assert told == {"run": "a", "base": {"path": "b", "sha256": "c"}}
