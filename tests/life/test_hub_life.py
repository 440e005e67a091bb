"""A model of the hub through train, resume, merge, chat, eval and export, in processes of their own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from mule import fsio
from mule.adapters.source import find_source
from mule.errors import ConfigError, ModelError
from mule.train.base import base_folder
from tests.hub_server import Files, HubServer
from tests.life.tiny_life import write_data
from tests.tiny_folder import write_tiny_folder

RAW: dict[str, Any] = {
    "model_type": "qwen3",
    "hidden_size": 64,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "vocab_size": 151936,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
}
RECIPE = """\
model: {path: org/tiny}
data: {train: [chats.jsonl], format: messages, max_seq_length: 64, valid_share: 0}
train: {seed: 3, steps: 2, step_rows: 4, micro_batch_rows: 2, threads: 1, compile: false,
  precision: fp32}
adapter: {kind: lora, lora: {r: 2, alpha: 4}}
"""
# Each argument is one command line; what it prints as JSON, or its error, is collected.
_CHILD = """
import contextlib, io, json, sys
from mule import machine
machine._measure_peak = lambda *_: 1e11
from mule.cli import main as cli
told = []
for words in sys.argv[1:]:
    sys.argv = ["mule", *words.split(), "--json"]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main()
        except SystemExit as end:
            code = end.code or 0
    shown = out.getvalue().splitlines()
    told.append([code, json.loads(shown[-1]) if shown else {}, err.getvalue()])
print(json.dumps(told))
"""


class Hub(HubServer):
    def mule(self, *commands: str, **environment: str) -> list[list[Any]]:
        """(exit code, result or error, what was shown) of each command."""
        cache = {"XDG_CACHE_HOME": str(self.home / "cache")}
        return self.run(_CHILD, commands, **cache, **environment)


def files_of(folder: Path) -> Files:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name != fsio.MANIFEST}


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    running = Hub(tmp_path / "home")
    running.home.mkdir()
    write_data(running.home)
    (running.home / "tune.yaml").write_text(RECIPE)
    yield running
    running.stop()


@pytest.fixture
def commits(hub: Hub, tmp_path: Path) -> list[str]:
    """The model's two states; the branch is at the first."""
    repo = hub.repo("org/tiny")
    for seed in (2, 1):
        write_tiny_folder(tmp_path / str(seed), RAW, seed=seed)
        repo.push(files_of(tmp_path / str(seed)))
    second, first = repo.commits
    return [first, second]


@pytest.mark.slow
def test_a_run_keeps_its_commit_though_the_branch_moves(hub: Hub, commits: list[str]) -> None:
    first, second = commits
    ((code, trained, shown),) = hub.mule("train tune.yaml")
    assert code == 0, trained
    assert f"org/tiny: main is commit {first}; to use exactly this one again" in " ".join(
        shown.split()
    )
    run = hub.home / "runs" / "tune"
    resolved = (run / "resolved.yaml").read_text()
    assert yaml.safe_load(resolved)["model"] == {"path": "org/tiny", "revision": first}
    assert f'revision: "{first}"  # main of org/tiny when the run began' in resolved
    base = fsio.read_json(run / "lineage.json")["base"]
    assert (base["path"], base["revision"], base["revision_asked"]) == ("org/tiny", first, "main")
    checkpoint = max(run.glob("checkpoint-*"))
    assert fsio.read_json(checkpoint / "mule_base.json")["base"] == f"org/tiny@{first}"
    written = fsio.read_json(checkpoint / "adapter_config.json")
    assert (written["base_model_name_or_path"], written["revision"]) == ("org/tiny", first)

    kept = {name: body for name, body in files_of(checkpoint).items() if "optimizer" not in name}
    hub.repo("org/adapter").push(kept)
    hub.repo("org/tiny").branches["main"] = second
    hub.asked.clear()
    resumed = hub.mule(
        "train runs/tune/recipe.yaml --resume",
        "train tune.yaml --resume --name tune",
        "train tune.yaml --resume --name tune model.revision=main",
        "train tune.yaml --resume --name tune model.revision=" + second,
        "merge runs/tune",
        "chat org/adapter --prompt cat --max-tokens 2",  # its base is found by name and commit
    )
    assert [code for code, *_ in resumed] == [0, 0, 0, 2, 0, 0], resumed
    assert f"model.revision (was '{first}', is '{second}')" in resumed[3][1]["error"]
    asked = [path for path in hub.paths() if "tiny" in path and path.endswith(("main", first))]
    assert asked == []  # it lies in the cache, and nobody asks what main is now

    ((code, trained, _),) = hub.mule("train tune.yaml --name again")
    assert code == 0, trained
    resolved = yaml.safe_load((hub.home / "runs/again/resolved.yaml").read_text())
    assert resolved["model"]["revision"] == second


@pytest.mark.slow
def test_verbs_take_a_hub_id(hub: Hub, commits: list[str]) -> None:
    chat, eval_, export, *previews, missing = hub.mule(
        "chat org/tiny --prompt cat --max-tokens 2",
        f"eval org/tiny@{commits[1]} --data chats.jsonl",
        "export org/tiny --types f16",
        "data preview chats.jsonl --tokenizer org/tiny",
        "data preview chats.jsonl tokenizer.path=org/tiny",
        "data preview chats.jsonl model.path=org/tiny",
        "chat runs/nothing --prompt cat",
    )
    for code, result, shown in (chat, eval_, export, *previews):
        assert code == 0, (result, shown)
    assert Path(export[1]["files"][0]["file"]).name == "tiny-F16.gguf"
    assert eval_[1]["loss"] > 0
    assert missing[0] == 2
    assert missing[1]["error"].startswith("runs/nothing: no run, model folder, adapter or GGUF")
    hub.stop()
    offline = hub.mule("chat org/tiny --prompt cat --max-tokens 2", HF_HUB_OFFLINE="1")
    assert offline[0][0] == 0


def test_a_local_folder_is_checked_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = Path("own/model")
    write_tiny_folder(folder, RAW)
    assert find_source("own/model").model_dir == folder
    raw = json.loads((folder / "config.json").read_text())

    (folder / "README.md").write_text("---\nbase_model: org/full\n---\nquantised by me\n")
    (folder / "config.json").write_text(json.dumps(raw | {"quantization": {"bits": 4}}))
    from mule.models.folder import load_model, read_config

    with pytest.raises(ModelError, match=r"own/model: its weights are quantised \(MLX\)") as mlx:
        read_config(folder)
    assert mlx.value.hint.startswith("use the model it was made from: org/full")

    (folder / "config.json").write_text(json.dumps(raw))
    (folder / "model.safetensors").rename(folder / "model.gguf")
    with pytest.raises(ModelError, match=r"own/model: holds GGUF files only \(model\.gguf\)"):
        load_model(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match="holds GGUF files only"):
        find_source("own/model")

    with pytest.raises(ModelError, match="own/other: no run, model folder, adapter or") as here:
        find_source("own/other")
    assert here.value.hint.endswith("; a model of the hub: hf://own/other")


def test_a_revision_of_a_local_model_has_no_effect(tmp_path: Path) -> None:
    from mule.config.load import load_recipe

    write_tiny_folder(tmp_path / "model", RAW)
    words = [f"model.path={tmp_path / 'model'}", "model.revision=v1", "data.train=[a.jsonl]"]
    with pytest.raises(ConfigError, match=r"model\.revision = v1 cannot take effect") as caught:
        base_folder(load_recipe(None, words).recipe)
    assert caught.value.hint == "remove model.revision, or write the hub's as hf://ORG/NAME"
