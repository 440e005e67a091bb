"""Runs side by side: what differs, how far they came, what their seeds can show."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from mule import fsio
from mule.cli.render_compare import show_comparison
from mule.commands import compare
from mule.compare.normalise import from_run
from mule.errors import UserError
from mule.run import Run
from tests.compare_case import write_run

FALLING = [4.0 - 0.1 * step for step in range(20)]


def shown(result: dict[str, object]) -> str:
    out = io.StringIO()
    show_comparison(Console(file=out, width=160, highlight=False), result)
    return out.getvalue()


def test_a_run_against_itself_differs_in_nothing(tmp_path: Path) -> None:
    run = write_run(tmp_path, "one", FALLING)
    found = compare.compare_runs([run, run])
    assert not found["differs"] and not found["differs_mechanically"]
    assert not found["significance"]["differences"]
    assert found["significance"]["words"] == [
        "The same settings and the same seed: nothing differs but the machine's doing."
    ]
    first, second = found["runs"]
    assert first == second and "No setting differs." in shown(found)


def test_what_differs_is_told_apart_from_what_changes_nothing(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path, "a", FALLING),
        write_run(tmp_path, "b", FALLING, rate=1e-4, micro=4),
    ]
    found = compare.compare_runs(runs)
    assert [row["key"] for row in found["differs"]] == ["optim.learning_rate"]
    assert found["differs"][0]["values"] == [2e-5, 1e-4]
    assert [row["key"] for row in found["differs_mechanically"]] == ["train.micro_batch_rows"]
    text = shown(found)
    assert "optim.learning_rate" in text and "changes nothing that is learned" in text


def test_figures_of_a_run(tmp_path: Path) -> None:
    run = write_run(tmp_path, "a", FALLING)
    (row, _) = compare.compare_runs([run, run])["runs"]
    assert row["updates"] == 20 and row["epochs"] == 2.5 and row["first_loss"] == 4.0
    assert row["train_loss"] == pytest.approx(2.1) and row["val_loss"] == pytest.approx(2.2)
    assert row["best_step"] == 20 and row["tokens_per_second"] == 1000
    assert row["memory_bytes"] == 2**30 and row["seconds"] >= 0


def test_one_seed_each_shows_nothing(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path, "a", FALLING),
        write_run(tmp_path, "b", [loss - 0.02 for loss in FALLING], rate=1e-4),
    ]
    (said,) = compare.compare_runs(runs)["significance"]["words"]
    assert "b against a: validation loss -0.0200 with one seed" in said
    assert "train.seed=1 and train.seed=2" in said


@pytest.mark.parametrize(
    ("gains", "is_beyond", "said"),
    [
        ((0.1, 0.11, 0.105), True, "lower beyond what seeds do"),
        ((0.1, -0.12, 0.02), False, "no measurable difference; with these seeds"),
    ],
)
def test_several_seeds_are_paired(
    tmp_path: Path, gains: tuple[float, ...], is_beyond: bool, said: str
) -> None:
    runs: list[Run] = []
    for seed, gain in enumerate(gains):
        chance = 0.3 * seed  # what a seed does to both settings alike
        losses = [loss + chance for loss in FALLING]
        runs.append(write_run(tmp_path, f"a{seed}", losses, seed=seed))
        better = [loss - gain for loss in losses]
        runs.append(write_run(tmp_path, f"b{seed}", better, seed=seed, rate=1e-4))
    found = compare.compare_runs(runs)["significance"]
    (difference,) = found["differences"]
    assert found["groups"] == {"a0": [0, 1, 2], "b0": [0, 1, 2]}
    assert difference["seeds"] == [0, 1, 2] and difference["is_beyond_noise"] is is_beyond
    assert difference["mean"] == pytest.approx(-sum(gains) / 3)
    assert said in found["words"][0] and "over 3 seeds" in found["words"][0]


def test_seeds_of_one_setting_are_chance(tmp_path: Path) -> None:
    runs = [write_run(tmp_path, f"a{seed}", FALLING, seed=seed) for seed in (0, 1)]
    assert compare.compare_runs(runs)["significance"]["words"] == [
        "The same settings with 2 seeds: what differs is chance."
    ]
    other = write_run(tmp_path, "b", FALLING, seed=5, rate=1e-4)
    said = compare.compare_runs([*runs, other])["significance"]["words"]
    assert "no seed is common to both" in said[0]


def test_a_comparison_is_written_as_a_page_and_as_markdown(tmp_path: Path) -> None:
    runs = [write_run(tmp_path, "a", FALLING), write_run(tmp_path, "b", FALLING, rate=1e-4)]
    out = [tmp_path / "pair.md", tmp_path / "pair.html"]
    found = compare.run(["a", "b"], root=tmp_path, out=out)
    assert found["compared"] == "runs" and found["files"] == [str(file) for file in out]
    text, page = out[0].read_text(), out[1].read_text()
    assert "pair-figures/training-loss.svg" in text
    assert (tmp_path / "pair-figures" / "validation-loss.svg").read_text().startswith("<svg")
    assert page.count("<svg") == 2 and "<script" not in page and 'src="http' not in page
    assert "optim.learning_rate" in page
    assert "\nfile " in shown(found) or "file  " in shown(found)
    json.dumps(found)
    assert runs[0].name == "a"


def test_a_run_is_a_setup_with_how_it_went(tmp_path: Path) -> None:
    own = from_run(write_run(tmp_path, "a", FALLING))
    assert own.kind == "fine-tune" and own.origin == "run"
    assert own.get("initial_loss") == 4.0 and own.get("final_loss") == pytest.approx(2.2)
    assert own.values["final_loss"].note == "validation"
    assert own.get("epochs") == 2.5 and own.get("trained_tokens") == 2000
    assert own.get("hardware") == "2 cores, a processor"
    assert own.get("batch_rows") == 4 and own.get("batch_tokens") == 256
    found = compare.run([str(tmp_path / "a")])
    assert found["next"] == f"mule runs show {tmp_path / 'a'}"
    rows = {row["key"]: row for row in found["rows"]}
    assert rows["initial_loss"]["verdict"] == rows["final_loss"]["verdict"] == "near"
    assert "Points of attention" in shown(found) and "Nearest published" in shown(found)


def test_what_assembling_found_out_is_read_where_it_is(tmp_path: Path) -> None:
    run = write_run(tmp_path, "a", FALLING)
    assert from_run(run).get("rows") is None
    data = {"num_examples": 300, "num_rows": 40, "num_tokens": 2500}
    fsio.write_json(run.folder / "facts.json", {"data": data})
    own = from_run(run)
    assert own.get("rows") == 300 and own.values["rows"].note == "in 40 rows"
    assert own.get("data_tokens") == 2500


def test_runs_that_cannot_be_compared(tmp_path: Path) -> None:
    run = write_run(tmp_path, "a", FALLING)
    with pytest.raises(UserError, match="nothing to stand beside") as caught:
        compare.compare_runs([run])
    assert "mule compare" in caught.value.hint
    empty = Run.create(tmp_path, "empty", "model: {path: base}\n")
    with pytest.raises(UserError, match="made no update"):
        compare.compare_runs([run, empty])


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / "here", "a", FALLING),
        write_run(tmp_path / "there", "a", FALLING, rate=1e-4),
    ]
    found = compare.compare_runs(runs)
    assert [row["run"] for row in found["runs"]] == [str(run.folder) for run in runs]
    assert len(found["significance"]["groups"]) == 2


def test_the_catalogue_is_listed() -> None:
    found = compare.list_published()
    rows = {row["name"]: row for row in found["published"]}
    assert rows["alpaca-7b"]["values"] > rows["alpaca-7b"]["unchecked"] > 0
    assert rows["mamba-124m-114k"]["origin"] == "described"
    text = shown(found)
    assert "alpaca-7b" in text and "a user's" in text and "not read at its source" in text
