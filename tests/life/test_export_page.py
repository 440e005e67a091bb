"""docs/export.md: every command of the page runs, from an adapter to the hub."""

from __future__ import annotations

import json
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from mule.commands import init
from mule.config.adapter import LoraSection
from mule.export.ollama import OllamaModel, docker_commands, ollama_commands, write_modelfile
from tests.life.test_to_gguf import FEW, MODEL, page_commands
from tests.life.tiny_life import REPOSITORY, Forker
from tests.merge_case import save_adapter
from tests.parity.template_styles import CHATML, load
from tests.tiny_folder import write_tiny_folder
from tests.unit.test_assume import QWEN
from tests.unit.test_push import TOKEN, Hub

PAGE = "docs/export.md"


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    running = Hub(tmp_path)
    running.writers.add(TOKEN)
    yield running
    running.stop()


@pytest.mark.slow
def test_every_command_of_the_page_runs(
    forker: Forker, tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = page_commands(PAGE)
    write_tiny_folder(tmp_path / MODEL, QWEN)
    monkeypatch.chdir(tmp_path)
    save_adapter(tmp_path / "runs" / "my-lora", Path(MODEL), LoraSection(r=2, alpha=4.0), std=0.1)
    _write_run(forker, tmp_path)
    for words in commands:
        if words[0] == "push":
            ((code, told, _),) = hub.push(f"{shlex.join(words[1:])} --yes")
            assert code == 0, told
        else:
            code = forker.run(tmp_path, *words)
            assert code == 0, f"{words}\n{(tmp_path / 'output.log').read_text()}"
    assert {words[0] for words in commands} == {"export", "verify", "push"}
    folder = tmp_path / "exports" / "my-lora"
    assert set(hub.repos) == {("model", "me/my-lora-GGUF"), ("model", "me/my-lora")}
    assert "my-lora-Q4_K_M.gguf" in hub.files("me/my-lora-GGUF")
    assert "model.safetensors" in hub.files("me/my-lora")
    for place in (folder, folder / "adapter", folder / "hf"):
        subprocess.run(["sha256sum", "-c", "--quiet", "SHA256SUMS"], cwd=place, check=True)
    check = json.loads((folder / "adapter" / "export.json").read_text())["files"][0]["check"]
    assert check["ok"] and check["base_file"] == "Qwen2.5-0.5B-Instruct-F16.gguf"
    assert 'SYSTEM """You are a patient teacher."""' in (folder / "Modelfile").read_text()


def _write_run(forker: Forker, home: Path) -> None:
    """What later sections go on from: runs/my-run, the files of its first export, and texts."""
    init.run(home / "example")
    (home / "example" / "data").rename(home / "data")
    rows = [
        json.dumps({"text": f"The old king saw {n} red birds near the river."}) for n in range(40)
    ]
    (home / "texts.jsonl").write_text("\n".join(rows) + "\n")
    train = f"train --model {MODEL} --data data --name my-run {FEW}"
    for line in (train, "export runs/my-run --types q8_0,q4_k_m"):
        code = forker.run(home, *line.split())
        assert code == 0, (home / "output.log").read_text()


def test_the_lines_for_other_programs_are_those_of_the_command(tmp_path: Path) -> None:
    page = (REPOSITORY / PAGE).read_text()
    for line in (
        *ollama_commands("exports/my-lora", "my-lora"),
        *docker_commands("exports/my-lora/my-lora-Q4_K_M.gguf", "my-lora", num_ctx=8192),
    ):
        assert line in page
    write_modelfile(tmp_path, OllamaModel("./my-lora-Q4_K_M.gguf", 8192), load(CHATML))
    assert (tmp_path / "Modelfile").read_text() in page
