"""A tiny model's whole life through the command line, as a script would drive it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.life.tiny_life import CHAT_RECIPE, LORA, Forker, write_data

Life = dict[str, dict[str, Any]]
# Widths that are multiples of 32, which q8_0 needs.
SHAPE = "{family: qwen3, hidden_size: 64, num_layers: 2, num_heads: 4, num_kv_heads: 2, "
SHAPE += "head_dim: 32, intermediate_size: 96, max_position_embeddings: 128}"
PRETRAIN = f"""\
model: {SHAPE}
tokenizer: {{vocab_size: 300}}
data: {{train: [text.txt], format: text, max_seq_length: 48}}
train: {{steps: 40, step_rows: 8, threads: 1, compile: false}}
optim: {{learning_rate: 0.01}}
"""
STEPS = {
    "train": "train pretrain.yaml --json",
    "sft": "train sft.yaml --json",
    "lora": "train lora.yaml --json",
    "merge": "merge lora --json",
    "export": "export exports/lora/merged --types f16,q8_0 --json",
    "verify": "verify exports/lora --json",
    "verify one": "verify exports/lora/lora-F16.gguf --json",
    "eval": "eval sft --json",
    "eval lora": "eval lora --json",
    "eval alone": "eval lora --no-base --max-rows 2 --json",
    "eval all": "eval lora exports/lora/merged exports/lora/lora-Q8_0.gguf --task held-out "
    "--task again.yaml --max-items 5 --out eval.json --json",
    "runs show": "runs show lora --json",
    "chat run": "chat lora --prompt hello --max-tokens 7 --json",
    "chat folder": "chat exports/lora/merged --prompt hello --max-tokens 7 --json",
    "chat GGUF": "chat exports/lora/lora-Q8_0.gguf --prompt hello --max-tokens 7 --json",
    "chat all": "chat lora exports/lora/merged exports/lora/lora-Q8_0.gguf --prompt hello "
    "--max-tokens 7 --temperature 0 --json",
}


def call(forker: Forker, folder: Path, line: str) -> tuple[int, dict[str, Any]]:
    """Run one command: its exit code, and the JSON object on the last line."""
    log = folder / "output.log"
    log.unlink(missing_ok=True)
    code = forker.run(folder, *line.split())
    return code, json.loads(log.read_text().splitlines()[-1])


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("life")
    write_data(folder)
    (folder / "pretrain.yaml").write_text(PRETRAIN)
    (folder / "sft.yaml").write_text(CHAT_RECIPE.replace("BASE", "runs/pretrain"))
    (folder / "again.yaml").write_text("score: exact\ndata: chats.jsonl\nmax_tokens: 9\n")
    (folder / "lora.yaml").write_text(CHAT_RECIPE.replace("BASE", "runs/sft") + LORA)
    return folder


@pytest.fixture(scope="module")
def life(forker: Forker, home: Path) -> Life:
    """Every command's JSON object, in order."""
    found = {}
    for name, line in STEPS.items():
        code, found[name] = call(forker, home, line)
        assert code == 0, f"mule {line}: {found[name]}"
    return found


def test_train_gives_its_figures(life: Life) -> None:
    for stage, steps in (("train", 40), ("sft", 16), ("lora", 16)):
        figures = life[stage]
        names = "run steps stopped_early train_loss val_loss best_val_loss best_step tokens "
        names += "tokens_per_second share_of_peak peak_memory_bytes devices next"
        names += " adapter_bytes" * (stage == "lora")
        assert set(figures) == set(names.split())
        assert figures["best_val_loss"] <= figures["val_loss"] and figures["best_step"] <= steps
        assert (figures["steps"], figures["stopped_early"]) == (steps, None)
        assert 0 < figures["val_loss"] < 6 and figures["tokens"] > 0
    assert life["train"]["run"] == "runs/pretrain"
    assert life["lora"]["next"] == "mule merge runs/lora"
    assert life["train"]["train_loss"] < 4.5, "it must have learned something"


def test_merge_reports_both_differences(life: Life) -> None:
    assert life["merge"]["merged_against_adapter"] < 1e-3 < life["merge"]["merged_against_base"]
    assert life["merge"]["next"] == "mule export exports/lora/merged"


def test_export_names_its_files(life: Life, home: Path) -> None:
    files = life["export"]["files"]
    assert [Path(entry["file"]).name for entry in files] == ["lora-F16.gguf", "lora-Q8_0.gguf"]
    assert all((home / entry["file"]).is_file() for entry in files)
    assert (home / life["export"]["modelfile"]).read_text().startswith("FROM ./lora-Q8_0.gguf")


def test_verify_finds_the_same_model(life: Life) -> None:
    assert life["verify"]["ok"] is True
    assert [entry["type"] for entry in life["verify"]["files"]] == ["f16", "q8_0"]
    one = life["verify one"]
    names = "ok file type size_bytes tokens_equal kl_mean kl_p99 top1 ppl_reference ppl stops"
    assert set(names.split()) <= set(one)
    assert one["ok"] is True and one["tokens_equal"] is True and one["stops"] is True
    assert one["type"] == "f16" and one["file"].endswith("lora-F16.gguf")
    assert 0 <= one["kl_mean"] <= one["kl_p99"] < 1e-3 and one["top1"] > 0.98
    assert one["ppl"] == pytest.approx(one["ppl_reference"], rel=1e-2)


def test_verify_of_another_model_fails_with_1(forker: Forker, home: Path, life: Life) -> None:
    line = "verify exports/lora/lora-F16.gguf --against pretrain --json"
    code, found = call(forker, home, line)
    assert code == 1
    assert found["ok"] is False and "not the same model" in found["verdict"]


def test_eval_and_runs_show(life: Life) -> None:
    names = "model loss perplexity bits_per_byte num_targets rows"
    assert set(names.split()) <= set(life["eval"])
    assert life["eval"]["loss"] == pytest.approx(life["sft"]["val_loss"], rel=0.05)
    shown = life["runs show"]
    assert (shown["run"], shown["state"], shown["steps"]) == ("lora", "finished", 16)
    assert shown["lineage"]["base"]["path"] == "runs/sft"
    assert shown["checkpoints"][-1]["step"] == 16
    assert shown["val_loss"] == life["lora"]["val_loss"]


def test_eval_of_an_adapter_is_beside_its_base(life: Life) -> None:
    found = life["eval lora"]
    assert found["models"] == ["sft", "lora"]
    before, after = found["held_out"]
    assert before["loss"] == pytest.approx(life["eval"]["loss"], rel=1e-4)
    assert after["loss"] == found["loss"] == pytest.approx(life["lora"]["val_loss"], rel=0.05)
    rows = {(row["task"], row["measure"]): row for row in found["comparison"]}
    assert set(rows) == {
        ("held-out", "loss"),
        ("general", "accuracy"),
        ("general", "accuracy_norm"),
    }
    loss = rows["held-out", "loss"]
    assert loss["difference"] == pytest.approx(after["loss"] - before["loss"], abs=1e-6)
    assert loss["low"] <= loss["difference"] <= loss["high"]
    assert [row["overlapping"] for row in found["overlap"]] == [0]
    alone = life["eval alone"]
    assert (alone["models"], alone["rows"], alone["comparison"]) == (["lora"], 2, [])
    assert alone["tasks"] == [] and alone["next"] == "mule chat lora"


def test_adapter_merged_and_quantised_are_one_model(life: Life, home: Path) -> None:
    found = life["eval all"]
    assert found["models"] == ["lora", "merged", "lora-Q8_0"]
    assert {row["verdict"] for row in found["comparison"]} == {"no measurable difference"}
    losses = [row["loss"] for row in found["held_out"]]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-2)
    (overlap,) = found["overlap"]  # the task asks what was trained on
    assert (overlap["items"], overlap["overlapping"]) == (5, 5)
    assert overlap["without"] == dict.fromkeys(found["models"])
    items = json.loads((home / "eval.json").read_text())["items"]
    assert len(items) == 5 and set(items[0]["answers"]) == set(found["models"])


def test_chat_answers_from_a_run_a_folder_and_a_gguf(life: Life) -> None:
    for name in ("chat run", "chat folder", "chat GGUF"):
        assert life[name]["prompt"] == "hello"
        assert isinstance(life[name]["text"], str) and life[name]["tokens"] >= 1
    together = life["chat all"]
    models = ["lora", "merged", "lora-Q8_0"]
    assert [answer["model"] for answer in together["answers"]] == models
    assert [difference["model"] for difference in together["differences"]] == models[1:]


def test_wrong_usage_exits_with_2(forker: Forker, home: Path, life: Life) -> None:
    for line in ("train --no-such-option", "chat", "verify nothing.gguf", "nonsense"):
        assert forker.run(home, *line.split()) == 2, line
    assert "Usage:" in (home / "output.log").read_text()


@pytest.mark.slow
def test_the_demo_has_seven_stages(forker: Forker, tmp_path: Path) -> None:
    code, found = call(forker, tmp_path, "demo --fast --json")
    assert code == 0, found
    names = "pretrain sft lora merged gguf-f16 gguf-q8_0 gguf-q4_k_m"
    assert [stage["stage"] for stage in found["stages"]] == names.split()
    for stage in found["stages"]:
        assert all(0 <= stage[name] <= 1 for name in ("exact_match", "exact_match_unseen"))
        assert stage["persona"] is None or 0 <= stage["persona"] <= 1
        assert stage["seconds"] > 0
    assert re.search(r"Q4_K_M\.gguf$", found["file"]) and (tmp_path / found["file"]).is_file()
    assert found["stages"][0]["persona"] is None
