"""Settings of other tools as recipes: each loads as `mule train` loads it, and says what differs."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from mule.compare.dialects.detect import detect
from mule.compare.dialects.foreign_file import HIDDEN, read_foreign
from mule.compare.dialects.known import DIALECTS
from mule.compare.dialects.table import Given, Key, ours
from mule.compare.import_recipe import Imported, Overrides, import_file
from mule.config.aliases import ALIASES
from mule.config.dump import value_of
from mule.config.knobs import knobs
from mule.config.load import load_recipe
from mule.config.presets import presets
from mule.errors import MuleError, UserError
from tests.conftest import Mule
from tests.dialects.planted import ORIGINALS

NAMES = sorted(file.name for file in ORIGINALS.iterdir())


def _imported(folder: Path, text: str, name: str = "config.yaml", **more: Any) -> Imported:
    file = folder / name
    file.write_text(text, encoding="utf-8")
    told = more.pop("told", None)
    return import_file(file, told, Overrides(**more))


def _chosen(found: Imported, *keys: str) -> list[Any]:
    return [value_of(found.recipe, key) for key in keys]


# ---------------------------------------------------------------- the originals


@pytest.mark.parametrize("name", NAMES)
def test_an_original_becomes_a_recipe_that_loads(name: str, tmp_path: Path) -> None:
    found = import_file(ORIGINALS / name)
    assert name.startswith(found.detected.dialect.name)
    assert found.detected.confidence == "sure"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(found.text, encoding="utf-8")
    assert load_recipe(recipe).recipe == found.recipe
    assert found.setup.unknown == []
    assert found.rows and all(row.key and row.value for row in found.rows)
    for row in found.rows:
        assert all(key in knobs() for key in row.ours.split(", ") if key), row


def test_donkeytune_is_its_preset() -> None:
    """recipes/donkeytune.yaml, written by hand, says what the import of its variables says."""
    preset = load_recipe(presets()["donkeytune"], complete=False).recipe
    found = import_file(ORIGINALS / "donkeytune.env").recipe
    open_here = {"name", "model.path", "data.train", "data.too_long", "export.types"}
    for key in knobs().keys() - open_here:
        assert value_of(found, key) == value_of(preset, key), key


def test_the_scale_of_mlx_is_alpha_over_r(tmp_path: Path) -> None:
    text = "iters: 10\nfine_tune_type: lora\nmodel: m\ndata: d\nlora_parameters: "
    found = _imported(tmp_path, text + "{rank: 8, alpha: 16, scale: 10, dropout: 0.05}")
    assert _chosen(found, "adapter.lora.alpha") == [80]
    (trap,) = [trap for trap in found.traps if trap.key == "lora_parameters.scale"]
    assert "alpha is 80 at rank 8; `alpha: 16` is not read at all" in trap.text


# ---------------------------------------------------------------- arithmetic


def test_the_batch_is_micro_batch_times_accumulation_times_devices(tmp_path: Path) -> None:
    text = "base_model: m\nsequence_len: 512\nmicro_batch_size: 2\ngradient_accumulation_steps: 4\n"
    text += "learning_rate: 1e-5\nval_set_size: 0.1\nnum_epochs: 1\n"
    one = _imported(tmp_path, text, data=["d"])
    assert _chosen(one, "train.step_examples", "data.valid_share") == [8, 0.1]
    assert any("--devices N" in trap.text for trap in one.traps)
    eight = _imported(tmp_path, text + "sample_packing: true\n", data=["d"], devices=8)
    assert _chosen(eight, "train.step_rows", "data.packing") == [64, True]
    assert not any("--devices N" in trap.text for trap in eight.traps)


def test_axolotl_s_old_batch_size_is_the_whole_update(tmp_path: Path) -> None:
    text = "base_model: m\nsequence_len: 512\nnum_epochs: 1\nlearning_rate: 1e-5\n"
    found = _imported(tmp_path, text + "batch_size: 32\nmicro_batch_size: 4\n", data=["d"])
    assert _chosen(found, "train.step_examples") == [32]


def test_iterations_of_mlx_are_updates_only_without_accumulation(tmp_path: Path) -> None:
    text = "iters: 600\nfine_tune_type: lora\nmodel: m\ndata: d\ngrad_accumulation_steps: 4\n"
    found = _imported(tmp_path, text + "batch_size: 2\nsave_every: 100\nsteps_per_eval: 50\n")
    keys = ("train.steps", "train.step_examples", "checkpoint.every_steps", "evaluate.every_steps")
    assert _chosen(found, *keys) == [150, 8, 25, 12]


def test_a_share_of_warm_up_needs_the_number_of_updates(tmp_path: Path) -> None:
    text = "model_name_or_path: m\ndataset_name: org/set\nuse_peft: true\nwarmup_ratio: 0.1\n"
    known = _imported(tmp_path, text + "max_steps: 500\n")
    assert _chosen(known, "train.steps", "optim.warmup_steps") == [500, 50]
    unknown = _imported(tmp_path, text)
    assert _chosen(unknown, "train.epochs", "optim.warmup_steps") == [3.0, None]
    assert any("`mule plan` tells the number" in lost.happens for lost in unknown.setup.lost)


def test_transformers_5_has_a_share_below_one_as_warmup_steps(tmp_path: Path) -> None:
    text = "model_name_or_path: m\ndataset_name: o/s\nuse_peft: true\nwarmup_steps: 0.2\nmax_steps: 50\n"
    assert _chosen(_imported(tmp_path, text), "optim.warmup_steps") == [10]


def test_a_constant_schedule_has_no_warm_up_there(tmp_path: Path) -> None:
    text = (
        "model_name_or_path: m\ndataset_name: o/s\nuse_peft: true\nmax_steps: 50\nwarmup_steps: 9\n"
    )
    plain = _imported(tmp_path, text + "lr_scheduler_type: constant\n")
    assert _chosen(plain, "optim.schedule", "optim.warmup_steps") == ["constant", 0]
    warm = _imported(tmp_path, text + "lr_scheduler_type: constant_with_warmup\n")
    assert _chosen(warm, "optim.schedule", "optim.warmup_steps") == ["constant", 9]


def test_what_the_tool_assumes_is_written_where_mule_assumes_another(tmp_path: Path) -> None:
    found = _imported(tmp_path, "model_name_or_path: m\ndataset_name: o/s\nuse_peft: true\n")
    keys = ("optim.learning_rate", "optim.beta2", "optim.weight_decay", "optim.schedule")
    assert _chosen(found, *keys) == [2e-5, 0.999, 0.0, "linear"]
    assert "beta2: 0.999  # TRL's default" in found.text
    assert "beta1" not in found.text  # 0.9 in both
    assert _chosen(found, "train.step_examples", "adapter.lora.alpha") == [8, 32]


def test_eight_bits_of_the_optimizer(tmp_path: Path) -> None:
    text = "base_model: m\nsequence_len: 512\nnum_epochs: 1\nlearning_rate: 1e-5\n"
    text += "optimizer: adamw_bnb_8bit\n"
    full = _imported(tmp_path, text, data=["d"])
    assert _chosen(full, "optim.kind", "adapter.kind") == ["adamw8bit", "none"]
    lora = _imported(tmp_path, text + "adapter: lora\nlora_r: 8\nlora_alpha: 8\n", data=["d"])
    assert _chosen(lora, "optim.kind", "adapter.kind") == ["adamw", "lora"]


def test_an_unknown_optimizer_and_schedule_are_said(tmp_path: Path) -> None:
    text = "base_model: m\nsequence_len: 512\nnum_epochs: 1\nlearning_rate: 1e-5\n"
    found = _imported(tmp_path, text + "optimizer: lion_8bit\nlr_scheduler: rex\n", data=["d"])
    said = {lost.key: lost.happens for lost in found.setup.lost}
    assert "AdamW instead" in said["optimizer"] and "REX" in said["lr_scheduler"]


@pytest.mark.parametrize(
    ("tool", "text", "expected"),
    [
        ("mlx-lm", "fine_tune_type: full\nnum_layers: 4", "trains only the last 4 blocks there"),
        ("mlx-lm", "model: mlx-community/x-4bit", "mlx's own quantised form cannot be read"),
        ("mlx-lm", "grad_accumulation_steps: 2", "an update comes after 2 of them"),
        ("mlx-lm", "resume_adapter_file: a.safetensors", "cannot be gone on with"),
        ("llama-factory", "packing: true", "packed into one row see each other there"),
        ("llama-factory", "loraplus_lr_ratio: 16", "A and B learn at one rate"),
        ("llama-factory", "finetuning_type: oft", "LoRA is taken instead"),
        ("llama-factory", "max_samples: 100", "all rows are used"),
        ("trl", "lora_r: 8", "do nothing without use_peft: true"),
        ("trl", "neftune_noise_alpha: 5", "no noise is added"),
        ("axolotl", "batch_size: 32", "Axolotl's batch_size is the whole update"),
        ("axolotl", "val_set_size: 200", "Mule holds out a share, not a count"),
        ("axolotl", "adapter: lora\nload_in_8bit: true", "stay in 16 bits: more memory"),
        ("axolotl", "adapter: lora\nlora_target_modules: [q_proj, lm_head]", "lm_head get no"),
        ("axolotl", "optimizer: muon\nlearning_rate: 0.02", "another number than one for AdamW"),
        ("axolotl", "lr_scheduler: moon_phase", "no schedule `moon_phase` here"),
        ("axolotl", "adapter: ia3", "there is no such adapter"),
        ("litgpt", "checkpoint_dir: m\nprecision: bf16-true", "small updates are not lost"),
        ("litgpt", "checkpoint_dir: m\ntrain: {min_lr: 1e-6}", "does not read min_lr"),
        ("litgpt", "checkpoint_dir: m\ntrain: {max_tokens: 9}", "fine-tuning refuses it"),
        ("litgpt", "checkpoint_dir: m\ndata: FLAN", "LitGPT prepares `FLAN` itself"),
    ],
)
def test_traps_and_losses_are_said(tmp_path: Path, tool: str, text: str, expected: str) -> None:
    model = None if "model:" in text else "m"
    found = _imported(tmp_path, text + "\n", told=tool, model=model, data=["d"])
    said = [trap.text for trap in found.traps] + [lost.happens for lost in found.setup.lost]
    assert any(expected in one for one in said), said


# ---------------------------------------------------------------- data


def test_llama_factory_s_data_sets_are_looked_up(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    info = {
        "mine": {
            "file_name": "mine.json",
            "formatting": "sharegpt",
            "columns": {"messages": "talk"},
            "tags": {"role_tag": "role", "content_tag": "content"},
        }
    }
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(info))
    text = "stage: sft\nfinetuning_type: lora\nmodel_name_or_path: m\ndataset: mine\n"
    found = _imported(tmp_path, text)
    assert _chosen(found, "data.train") == [[str(tmp_path / "data" / "mine.json")]]
    assert _chosen(found, "data.format", "data.columns") == ["messages", {"messages": "talk"}]
    assert not any("a guess" in trap.text for trap in found.traps)
    guess = _imported(tmp_path, text.replace("mine", "other"))
    assert any("other: names of LLaMA-Factory's dataset_info" in t.text for t in guess.traps)
    (tmp_path / "data" / "dataset_info.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        _imported(tmp_path, text)


@pytest.mark.parametrize(
    ("entry", "name", "columns"),
    [
        ("{path: d, type: alpaca}", "alpaca", {}),
        ("{path: d, type: sharegpt}", "sharegpt", {}),
        ("{path: d, type: chat_template}", "messages", {}),
        ("{path: d, type: chat_template, field_messages: talk}", "messages", {"messages": "talk"}),
        ("{path: d, type: completion, field: body}", "text_rows", {"text": "body"}),
        (
            "{path: d, type: {field_instruction: q, field_output: a}}",
            "alpaca",
            {"instruction": "q", "output": "a"},
        ),
        ("{path: d, type: something_own}", "auto", {}),
    ],
)
def test_axolotl_s_types(tmp_path: Path, entry: str, name: str, columns: dict[str, str]) -> None:
    text = f"base_model: m\nsequence_len: 512\nlearning_rate: 1e-5\ndatasets:\n  - {entry}\n"
    found = _imported(tmp_path, text)
    assert _chosen(found, "data.format", "data.columns") == [name, columns]


# ---------------------------------------------------------------- which tool


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("zero_optimization: {stage: 3}\n", "it holds `zero_optimization.stage`"),
        ("compute_environment: LOCAL_MACHINE\n", "accelerate's launcher"),
        ("apples: 1\npears: 2\n", "not the settings of a tool that can be read; it has apples"),
        ("learning_rate: 1e-4\nseed: 1\n", "it could be"),
        ("- a\n- b\n", "config.yaml:1: no settings here"),
        ("", "it is empty"),
        ("a: &a [x]\nb: !!python/object:x {}\n", "config.yaml:2: the tag"),
        ("a: 1\na: 2\n", "config.yaml:2: a: given twice"),
        ("model: {path: m}\noptim: {learning_rate: 1e-4}\n", "a recipe of Mule's already"),
        ("stage: dpo\nfinetuning_type: lora\nmodel_name_or_path: m\n", "DPO has no equivalent"),
        ("base_model: m\nrl: kto\nsequence_len: 8\nnum_epochs: 1\n", "preferences has no equiv"),
        ("iters: 1\nfine_tune_type: lora\ntraining_mode: dpo\n", "preferences has no equivalent"),
    ],
)
def test_what_cannot_be_imported_says_why(tmp_path: Path, text: str, expected: str) -> None:
    with pytest.raises(UserError) as caught:
        _imported(tmp_path, text)
    assert expected in caught.value.message
    assert caught.value.hint


def test_a_bomb_of_aliases_is_refused(tmp_path: Path) -> None:
    lines = ["a0: &a0 {x: 1}"]
    lines += [f"a{n}: &a{n} {{p: *a{n - 1}, q: *a{n - 1}, r: *a{n - 1}}}" for n in range(1, 12)]
    with pytest.raises(UserError, match="expand without end"):
        _imported(tmp_path, "\n".join(lines))
    with pytest.raises(UserError, match="larger than 1,000,000 bytes"):
        _imported(tmp_path, f"a: {'x' * 1_000_001}")


def test_the_tool_can_be_told(tmp_path: Path) -> None:
    text = "learning_rate: 1e-4\nnum_epochs: 2\n"
    found = _imported(tmp_path, text, told="axolotl", model="m", data=["d"])
    assert found.detected.confidence == "told"
    assert _chosen(found, "train.epochs", "model.path") == [2.0, "m"]
    with pytest.raises(UserError) as caught:
        _imported(tmp_path, text, told="axolotle")
    assert caught.value.hint == "did you mean --from axolotl?"


def test_what_the_file_leaves_open_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        _imported(tmp_path, "iters: 5\nfine_tune_type: lora\nval_batches: 2\n")
    assert "the file does not say the data and the model" in caught.value.message
    assert "--data ./data" in caught.value.hint and "--model" in caught.value.hint


# ---------------------------------------------------------------- forms


@pytest.mark.parametrize(
    ("command", "tool", "key", "value"),
    [
        ("trl sft --model_name_or_path m --dataset_name o/s --use_peft --lora_r 4", "trl", "r", 4),
        (
            "accelerate launch --num_processes 4 sft.py --model_name_or_path m \\\n"
            "  --dataset_name o/s --use_peft --lora_r=4",
            *("trl", "r", 4),
        ),
        ("mlx_lm.lora --model m --data d --train --num-layers 4", "mlx-lm", "last_layers", 4),
        (
            "litgpt finetune_lora org/m --lora_r 4 --data JSON --data.init_args.json_path d",
            "litgpt",
            "r",
            4,
        ),
        ("# a note\nmake train MODEL=m RANK=4", "donkeytune", "r", 4),
        ("./fine-tune.sh --model m --rank 4", "donkeytune", "r", 4),
    ],
)
def test_command_lines(tmp_path: Path, command: str, tool: str, key: str, value: int) -> None:
    found = _imported(tmp_path, command, "run.sh")
    assert found.detected.dialect.name == tool
    assert _chosen(found, f"adapter.lora.{key}") == [value]


def test_devices_of_a_command_line_are_counted(tmp_path: Path) -> None:
    words = "accelerate launch --num_processes 4 sft.py --model_name_or_path m --dataset_name o/s "
    found = _imported(tmp_path, words + "--per_device_train_batch_size 2", "run.sh")
    assert _chosen(found, "train.step_examples") == [8]


def test_variables_of_a_script_are_put_in(tmp_path: Path) -> None:
    text = 'BASE=org\nMODEL="$BASE/m"\nmlx_lm.lora --model ${MODEL} --data d > log.txt 2>&1\n'
    assert _chosen(_imported(tmp_path, text, "run.sh"), "model.path") == ["org/m"]
    bomb = f"A={'$B' * 1000}\nB={'$C' * 1000}\nC={'x' * 1000}\nmlx_lm.lora --model $A --data d\n"
    with pytest.raises(UserError, match="its variables expand without end"):
        _imported(tmp_path, bomb, "run.sh")
    with pytest.raises(UserError) as caught:
        _imported(tmp_path, "mlx_lm.lora --model $WHAT --data d", "run.sh")
    assert "run.sh:1: the value of $WHAT does not stand in this file" in caught.value.message
    assert caught.value.hint == "write the value in its place, or WHAT=VALUE above"


def test_a_command_that_names_a_file_sends_there(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        _imported(tmp_path, "axolotl train config.yml", "run.sh")
    assert caught.value.hint == "mule recipe import config.yml"
    with pytest.raises(UserError, match="not a command a shell would take"):
        _imported(tmp_path, "trl sft --output_dir 'open", "run.sh")


def test_secrets_are_never_kept(tmp_path: Path) -> None:
    secret = "hf_" + "a" * 30
    text = (ORIGINALS / "donkeytune.env").read_text() + f"HF_TOKEN={secret}\n"
    (tmp_path / "x.env").write_text(text)
    assert read_foreign(tmp_path / "x.env").given["HF_TOKEN"].value == HIDDEN
    found = import_file(tmp_path / "x.env")
    assert secret not in repr(found) and secret not in found.text


# ---------------------------------------------------------------- tables


def test_the_tables_agree_with_the_aliases_of_the_errors() -> None:
    """One truth: a key that an error names ours is imported as the same."""
    for dialect in DIALECTS.values():
        for name, entry in dialect.keys.items():
            alias = ALIASES.get(name, "")
            if isinstance(entry, Key) and entry.fact in knobs() and alias and " " not in alias:
                assert entry.fact == alias, (dialect.name, name)


def test_every_fact_that_is_a_setting_exists() -> None:
    for dialect in DIALECTS.values():
        facts = [entry.fact for entry in dialect.keys.values() if isinstance(entry, Key)]
        for fact in (*facts, *dialect.defaults):
            assert "." not in fact or fact in knobs(), (dialect.name, fact)
        assert dialect.signs <= set(dialect.keys)
    with pytest.raises(KeyError, match="no alias and not the name of one setting"):
        ours("nothing_of_the_kind")


ODD = (
    None,
    True,
    -1,
    0,
    1e300,
    float("nan"),
    "",
    "x" * 200,
    "auto",
    [],
    [1, [2]],
    {},
    {"a": {"b": 1}},
)


@pytest.mark.parametrize(
    "name", ["axolotl-llama-3-instruct-lora-8b.yml", "litgpt-tinystories.yaml"]
)
def test_odd_values_are_refused_or_left_out(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _survives(name, 12, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_odd_values_of_every_original(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _survives(name, 60, monkeypatch)


def _survives(name: str, times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from mule.compare import import_recipe as module

    foreign, draw = read_foreign(ORIGINALS / name), random.Random(name)
    for _ in range(times):
        key = draw.choice(list(foreign.given))
        given = dict(foreign.given) | {key: Given(key, draw.choice(ODD), 1)}
        changed = type(foreign)(foreign.file, given, foreign.form, foreign.program)
        monkeypatch.setattr(module, "read_foreign", lambda _, changed=changed: changed)
        try:
            assert import_file(ORIGINALS / name).recipe.data.train
        except MuleError as error:
            assert error.hint, key


# ---------------------------------------------------------------- the command


def test_the_verb_writes_a_recipe_and_says_everything(mule_cli: Mule) -> None:
    source = str(ORIGINALS / "axolotl-llama-3-instruct-lora-8b.yml")
    code, out, _ = mule_cli("recipe", "import", source, "--out", "recipe.yaml")
    assert code == 0
    assert "settings of Axolotl (sure: " in out
    assert "optimizer" in out and "optim.kind" in out
    assert "Traps\n  micro_batch_size: " in out
    assert "No equivalent, and what happens\n  line 5: load_in_8bit: " in out
    assert "Left out (speed and memory, which Mule decides by itself): " in out
    assert out.rstrip().endswith("next: mule plan recipe.yaml")
    assert load_recipe("recipe.yaml").recipe.adapter.lora.r == 32
    code, _, err = mule_cli("recipe", "import", source, "--out", "recipe.yaml")
    assert code == 2 and "recipe.yaml exists" in err


def test_the_verb_as_json(mule_cli: Mule, tmp_path: Path) -> None:
    (tmp_path / "bad.yml").write_text("base_model: m\nsequence_len: 64\nlearning_rate: 1\n")
    code, out, _ = mule_cli("recipe", "import", "bad.yml", "--data", "d", "--json")
    told = json.loads(out.splitlines()[-1])
    assert code == 0 and told["tool"] == "Axolotl" and told["out"] is None
    assert told["recipe"].startswith("# Imported from bad.yml")
    assert {one["code"] for one in told["mistakes"]} == {"rate-too-high", "rows-too-short"}
    assert told["next"] == "mule recipe import bad.yml --out recipe.yaml"


def test_the_verb_on_a_folder_and_on_nothing(mule_cli: Mule, tmp_path: Path) -> None:
    code, _, err = mule_cli("recipe", "import", str(tmp_path))
    assert code == 2 and "a folder, not a file of settings" in err
    code, _, err = mule_cli("recipe", "import", "none.yaml")
    assert code == 2 and "none.yaml: no such file" in err
    assert "hint: give the tool's file" in err


def test_detect_names_the_keys_that_say_so() -> None:
    foreign = read_foreign(ORIGINALS / "mlx-lm-lora.yaml")
    assert "fine_tune_type" in detect(foreign).signs
