"""`mule data prepare` and `mule data stats`: rows, their figures and their integrity."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from mule.cli.render_data import print_stats
from mule.commands import data_prepare, data_stats
from mule.errors import StorageError, UserError
from mule.run import Run
from mule.tokenizer import Tokenizer


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    lines = [chat(f"What is {n}?", "A number.") for n in range(20)] + [chat("Long?", "Yes " * 200)]
    Path("x.jsonl").write_text("".join(lines))
    Tokenizer.train(["What is a number? Yes. " * 9], 300).save("folder")
    return tmp_path


def chat(question: str, answer: str) -> str:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return json.dumps({"messages": turns}) + "\n"


def shown(result: dict[str, Any]) -> str:
    out = io.StringIO()
    print_stats(Console(file=out, width=120, highlight=False), result)
    return out.getvalue()


# ---------------------------------------------------------------- prepare


def test_prepare_makes_the_rows_that_training_finds() -> None:
    words = ["model.size=1m", "tokenizer.vocab_size=300", "data.max_seq_length=64"]
    words += ["data.train=x.jsonl", "data.valid_share=0.1"]
    result = data_prepare.run(words)
    assert result["kind"] == "chat"
    assert result["examples"] + result["dropped"] + result["valid"]["examples"] == 21
    assert 0 < result["targets"] < result["tokens"]
    assert 0 < result["fill"] <= 1
    assert Path(result["folder"]).parent == Path("runs/.prepared")
    assert result["tokens_per_second"] > 0 and result["made"] == "now"
    assert result["next"] == f"mule train {' '.join(words)}"
    again = data_prepare.run(words)
    assert (again["folder"], again["made"]) == (result["folder"], "earlier, and found again")
    assert "tokens_per_second" not in again


def test_prepare_takes_data_and_a_tokenizer() -> None:
    result = data_prepare.run(["x.jsonl", "data.max_seq_length=64"], tokenizer="folder")
    assert result["tokenizer"] == "the tokenizer of folder"
    assert result["vocab_size"] == Tokenizer.load("folder").vocab_size
    assert result["next"] == f"mule data stats {result['folder']}"
    with_recipe = data_prepare.run(
        ["data.train=x.jsonl", "data.max_seq_length=64", "tokenizer.path=folder"]
    )
    assert with_recipe["folder"] == result["folder"]  # the same rows, whoever names them


def test_prepare_says_how_to_train_on_paths() -> None:
    result = data_prepare.run(["x.jsonl", "model.size=1m", "tokenizer.vocab_size=300"])
    assert result["next"] == (
        "mule train model.size=1m tokenizer.vocab_size=300 'data.train=[\"x.jsonl\"]'"
    )


def test_prepare_needs_the_tokenizer_of_a_model() -> None:
    with pytest.raises(UserError, match="no tokenizer: what is prepared must be") as caught:
        data_prepare.run(["x.jsonl", "data.max_seq_length=64"])
    assert caught.value.hint == (
        "mule data prepare x.jsonl data.max_seq_length=64 --tokenizer MODEL_FOLDER; or, for a new "
        "model, train one on this data: "
        "mule data prepare x.jsonl data.max_seq_length=64 tokenizer.vocab_size=16384"
    )
    assert not Path("runs").exists()


# ---------------------------------------------------------------- stats


@pytest.fixture
def prepared() -> dict[str, Any]:
    words = ["x.jsonl", "data.max_seq_length=64", "data.valid_share=0.1"]
    return data_prepare.run(words, tokenizer="folder")


def test_stats_say_what_prepare_said(prepared: dict[str, Any]) -> None:
    result = data_stats.run(prepared["folder"])
    (part,) = result["parts"]
    for name in ("rows", "row_length", "examples", "tokens", "targets", "fill", "dropped"):
        assert part[name] == prepared[name], name
    assert part["share_targets"] == prepared["targets"] / prepared["tokens"]
    assert sum(each["count"] for each in part["histogram"]) == part["examples"]
    lengths = part["lengths"]
    assert lengths["min"] <= lengths["p5"] <= lengths["p50"] <= lengths["p99"] <= lengths["max"]
    assert round(lengths["mean"] * part["examples"]) == part["tokens"]
    assert [source["file"] for source in part["sources"]] == ["x.jsonl"]
    assert part["tokenizer"] == Tokenizer.load("folder").fingerprint()
    assert part["split"] == "train: 0.1 of the data is held out for validation, by seed 0"


def test_stats_in_the_terminal(prepared: dict[str, Any]) -> None:
    text = shown(data_stats.run(prepared["folder"]))
    assert text.startswith(prepared["folder"])
    assert "integrity  verified: every file is as it was written" in text
    assert f"rows       {prepared['rows']:,} of 64 tokens, " in text
    assert f"{prepared['examples']} chat examples, " in text
    assert f"{prepared['targets']:,} learned (" in text
    assert "17-32  ████████" in text
    assert "x.jsonl" in text and " KiB" in text


def test_stats_of_documents() -> None:
    Path("a.txt").write_text("One two three. " * 90)
    result = data_prepare.run(["a.txt", "data.max_seq_length=16"], tokenizer="folder")
    (part,) = data_stats.run(result["folder"])["parts"]
    assert (part["kind"], part["examples"], part["packing"]) == ("text", 1, None)
    assert part["lengths"]["max"] == part["tokens"]
    assert "1 document\n" in shown({"parts": [part]})


def test_stats_of_a_recipe_and_of_a_run(prepared: dict[str, Any]) -> None:
    Path("r.yaml").write_text(
        "model: {size: 1m}\ntokenizer: {path: folder}\n"
        "data: {train: [x.jsonl], max_seq_length: 64, valid_share: 0.1}\n"
    )
    result = data_stats.run("r.yaml")
    assert [part["folder"] for part in result["parts"]] == [
        prepared["folder"],
        prepared["valid"]["folder"],
    ]
    assert result["next"] == "mule train r.yaml"
    run = Run.create(Path("runs"), "mine", "")
    with pytest.raises(UserError, match="nothing was trained yet") as caught:
        data_stats.run("mine")
    assert caught.value.hint == "mule data prepare runs/mine/recipe.yaml makes its rows"
    with run.lock():
        run.write_lineage({"data": Path(prepared["folder"]).name})
    result = data_stats.run("mine")
    assert result["parts"][0]["folder"] == prepared["folder"]
    assert result["next"] == "mule runs show runs/mine"


def test_a_changed_byte_is_found(prepared: dict[str, Any]) -> None:
    file = Path(prepared["folder"]) / "tokens.bin"
    content = bytearray(file.read_bytes())
    content[7] ^= 1
    file.write_bytes(content)
    with pytest.raises(StorageError, match=r"tokens\.bin: its content differs from its SHA-256"):
        data_stats.run(prepared["folder"])


def test_the_parts_of_several_workers_are_verified() -> None:
    from mule.data.prepare import RowSettings
    from mule.data.scale import merge_parts, part_folder, prepare_files
    from mule.data.sources.options import ReadOptions

    Path("y.jsonl").write_text(Path("x.jsonl").read_text().replace("number", "figure"))
    tokenizer = Tokenizer.load("folder")
    settings = RowSettings(ReadOptions(), 64)
    for index in range(2):
        prepare_files(["x.jsonl", "y.jsonl"], tokenizer, settings, "out", index, 2)
    merge_parts([part_folder("out", index, 2) for index in range(2)], "out")
    (part,) = data_stats.run("out")["parts"]
    assert (part["workers"], part["examples"]) == (2, 40)
    assert sum(each["count"] for each in part["histogram"]) == 40
    manifest = part_folder("out", 1, 2) / "manifest.json"
    manifest.write_text(manifest.read_text() + " ")
    with pytest.raises(StorageError, match="prepared again since the parts were merged"):
        data_stats.run("out")


def test_what_holds_no_rows_is_refused() -> None:
    with pytest.raises(UserError, match="nothing: no prepared folder, run or recipe") as caught:
        data_stats.run("nothing")
    assert "runs/.prepared" in caught.value.hint
    Path("runs/mine").mkdir(parents=True)
    Path("runs/mine/recipe.yaml").touch()
    Path("runs/mine/lineage.json").write_text('{"data": "train-0123456789abcdef"}')
    with pytest.raises(StorageError, match="the rows of runs/mine are not there any more"):
        data_stats.run("mine")
