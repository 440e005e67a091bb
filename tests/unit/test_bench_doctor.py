"""The fault bench: what is planted where, and that the parts have nothing in common."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from bench import doctor, doctor_cases, doctor_figures
from bench.doctor_data import ATLAS_CHATS, ATLAS_TEXT, Folder
from bench.doctor_faults import CODES, FAULTS
from bench.doctor_figures import Outcome
from bench.doctor_plots import PICTURES
from bench.doctor_settings import BASES, PARTS, SETTINGS, Part, healthy_runs
from bench.doctor_svg import Line, Panel, drawing, nice_ticks
from mule.config.load import load_recipe
from mule.doctor.finding import Finding, Found
from mule.doctor.rules import all_rules
from tests.doctor_case import history


class Anything(Folder):
    """Rows of any name, where the data is not there."""

    def has(self, name: str) -> bool:
        return True

    def rows(self, name: str, seed: int, count: int) -> list[dict[str, Any]]:
        count = min(count, 120)
        if name in {base.text for part in PARTS for base in BASES[part].values()} or (
            name in {s.data for part in PARTS for s in SETTINGS[part].values() if not s.base}
        ):
            return [{"text": f"{name} {place} " + "word " * 40} for place in range(count)]
        return [
            {
                "messages": [
                    {"role": "user", "content": f"{name} {place}?"},
                    {"role": "assistant", "content": f"It is {place}."},
                ]
            }
            for place in range(count)
        ]


NOTHING = Anything(Path("nowhere"))


def _data(part: Part) -> set[str]:
    bases = BASES[part].values()
    used = {name for base in bases for name in (base.text, base.chats)}
    return used | {setting.data for setting in SETTINGS[part].values()}


def _families(part: Part) -> set[str]:
    recipes = [s.recipe for s in SETTINGS[part].values()] + [b.recipe for b in BASES[part].values()]
    return {recipe["model.family"] for recipe in recipes if "model.family" in recipe}


def _shapes(part: Part) -> set[str]:
    recipes = [s.recipe for s in SETTINGS[part].values()] + [b.recipe for b in BASES[part].values()]
    keys = ("model.hidden_size", "model.num_layers")
    return {str([recipe[key] for key in keys]) for recipe in recipes if keys[0] in recipe}


def test_the_bench_is_as_large_as_it_says() -> None:
    assert len(FAULTS) >= 18
    assert len(doctor_cases.SEEDS["held-out"]) == 5
    assert len(healthy_runs("held-out")) >= 40
    found = doctor_cases.cases("held-out")
    assert len(found) == 5 * len(FAULTS) + len(healthy_runs("held-out"))
    assert len({case.name for case in found}) == len(found)


def test_the_parts_share_neither_data_nor_families_nor_shapes_nor_seeds() -> None:
    for of in (_data, _families, _shapes):
        assert not of("development") & of("held-out"), of
    seeds = [{case.seed for case in doctor_cases.cases(part)} for part in PARTS]
    assert not seeds[0] & seeds[1]


def test_every_fault_has_rules_that_should_find_it() -> None:
    assert CODES.keys() == FAULTS.keys()
    known = {rule.code for rule in all_rules()}
    assert {code for codes in CODES.values() for code in codes.split()} <= known


def test_a_fault_meets_several_settings_of_its_kinds() -> None:
    found = doctor_cases.cases("held-out")
    for name, fault in FAULTS.items():
        own = [case for case in found if case.fault == name]
        assert {case.setting.kind for case in own} == set(fault.kinds)
        assert len({case.setting_name for case in own}) >= 2


@pytest.mark.parametrize("part", PARTS)
def test_every_case_is_a_recipe_and_no_two_are_the_same(part: Part, tmp_path: Path) -> None:
    keys, seed = set(), doctor_cases.SEEDS[part][0]
    found = [case for case in doctor_cases.cases(part) if case.healthy or case.seed == seed]
    for case in found:
        draft = case.draft(tmp_path / "cache", NOTHING)
        folder = tmp_path / case.name
        doctor_cases.write(draft, folder)
        recipe = load_recipe(folder / doctor_cases.RECIPE).recipe
        assert recipe.train.seed == case.seed
        assert recipe.optim.warmup_steps is None or recipe.optim.warmup_steps < recipe.train.steps
        rows = (folder / doctor_cases.TRAIN).read_text().splitlines()
        assert [json.loads(row) for row in rows] == draft.train
        keys.add(doctor_cases.key_of(draft, draft.damage or ""))
        again = case.draft(tmp_path / "elsewhere", NOTHING)
        assert doctor_cases.key_of(again, again.damage or "") in keys
    assert len(keys) == len(found)


def test_a_fault_is_planted_in_a_copy_of_the_data(tmp_path: Path) -> None:
    before = Folder(tmp_path).rows(ATLAS_CHATS, 0, 50)
    (case,) = (c for c in doctor_cases.cases("development") if c.name == "few-targets-1")
    case.draft(tmp_path, NOTHING)
    assert Folder(tmp_path).rows(ATLAS_CHATS, 0, 50) == before
    assert not Folder(tmp_path).has("novels")
    assert Folder(tmp_path).has(ATLAS_TEXT)


def test_cases_without_their_data_are_left_out(tmp_path: Path) -> None:
    found, lacking = doctor_cases.available("held-out", "", Folder(tmp_path))
    assert not found
    assert len(lacking) == len(doctor_cases.cases("held-out"))
    found, lacking = doctor_cases.available("held-out", "healthy", NOTHING)
    assert len(found) == len(healthy_runs("held-out"))
    assert not lacking


def _outcome(fault: str, *found: tuple[str, str]) -> Outcome:
    case = next(c for c in doctor_cases.cases("development") if c.fault == fault)
    findings = [Finding(code, "", Found(severity, 1, "", "")) for code, severity in found]
    return Outcome(case, history(num_steps=200), findings, 50 if found else None)


def test_only_an_alarm_or_a_warning_of_an_expected_rule_counts() -> None:
    found = [
        _outcome("clipped", ("D203", "warning")),
        _outcome("clipped", ("D203", "note")),
        _outcome("clipped", ("D101", "alarm")),
        _outcome("", ("D203", "note")),
        _outcome("", ("D203", "warning")),
    ]
    figures = doctor_figures.figures(found)
    assert [figures["recall"][key] for key in ("found", "runs")] == [1, 3]
    assert figures["recall"]["median_updates"] == 50
    assert figures["recall"]["median_share"] == 0.25
    assert [miss["codes"] for miss in figures["recall"]["missed"]] == [[], ["D101"]]
    assert figures["healthy"]["false_alarms"] == 1
    assert figures["healthy"]["which"][0]["codes"] == ["D203"]


def test_a_healthy_run_on_data_that_repeats_itself_counts_apart(tmp_path: Path) -> None:
    assert doctor_figures.repeated_share(tmp_path) == 0.0
    (tmp_path / "train.jsonl").write_text("a\nb\na\na\n")
    assert doctor_figures.repeated_share(tmp_path) == 0.5
    case = next(c for c in doctor_cases.cases("held-out") if not c.fault)
    told = Finding("D501", "", Found("warning", 1, "repeated", "", {}))
    sound = Outcome(case, history(), [], None, 0.0)
    found = doctor_figures.figures([sound, Outcome(case, history(), [told], None, 0.5)])
    assert found["healthy"]["runs"] == 1 and not found["healthy"]["false_alarms"]
    repeating = {"runs": 1, "told": 1, "least_share": 0.5, "other_codes": []}
    assert found["repeating"] == repeating


def test_the_first_evaluation_that_knew_it_counts(tmp_path: Path) -> None:
    case = next(c for c in doctor_cases.cases("development") if c.fault == "not-a-number")
    run = case.run(tmp_path)
    run.folder.mkdir(parents=True)
    words = (
        "{train: {steps: 40}, data: {train: [x]}, model: {size: 10m}, evaluate: {every_steps: 10}}"
    )
    for file in ("recipe.yaml", "resolved.yaml"):
        (run.folder / file).write_text(words)
    for step in range(1, 41):
        run.log_metrics({"step": step, "loss": 4.0 - step / 20, "grad_norm": 1.0})
        if step in (13, 14):
            run.log_event("update refused", step=step, cause="loss nan: not finite")
    outcome = doctor_figures.outcome(case, tmp_path)
    assert outcome.is_found
    assert outcome.step == 20


def test_the_page_explains_every_rule_and_shows_every_picture() -> None:
    page = (doctor.ROOT / "docs" / "is-my-run-healthy.md").read_text(encoding="utf-8")
    for rule in all_rules():
        assert f"[{rule.code}](doctor-rules.md#{rule.code.lower()}-" in page, rule.code
    shown = {line.rpartition("/")[2].rstrip(")") for line in page.splitlines() if line[:2] == "!["}
    assert shown == {picture.name for picture in PICTURES}
    assert shown == {file.name for file in doctor.PLOTS.glob("*.svg")}
    assert sum(file.stat().st_size for file in doctor.PLOTS.glob("*.svg")) < 300_000


def test_a_picture_has_both_curves_on_one_scale() -> None:
    sound = Panel("sound", [Line([(1, 4.0), (50, 2.0)], "blue", "training")], 50)
    wild = Panel("a < b", [Line([(1, 4.0), (50, 8.0)], "red")], 50, mark=(20, "told after 20"))
    text = drawing([sound, wild], "loss")
    root = ElementTree.fromstring(text)
    lines = root.findall("{*}polyline")
    ys = [[float(p.split(",")[1]) for p in line.attrib["points"].split()] for line in lines]
    assert ys[0][0] == ys[1][0]  # 4.0 in both
    assert ys[1][1] < ys[0][0] < ys[0][1]  # up is a smaller y
    assert {"a < b", "told after 20", "training", "updates"} <= {t.text for t in root.iter()}
    assert drawing([sound, wild], "loss") == text
    assert "1e-09" in drawing(
        [Panel("", [Line([(1, 1e-9), (2, 1.0)], "red")], 2)], "", logarithmic=True
    )


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [(0, 10, [0, 2, 4, 6, 8, 10]), (1.9, 4.1, [2, 2.5, 3, 3.5, 4]), (0, 0.004, [0, 0.001, 0.002])],
)
def test_ticks_are_round_numbers(low: float, high: float, ticks: list[float]) -> None:
    assert nice_ticks(low, high)[: len(ticks)] == pytest.approx(ticks)


def test_a_wrong_word_shows_how_it_is_used() -> None:
    for words in ([], ["walk"], ["run", "part=half"], ["report", "now"], ["run", "cash=x"]):
        with pytest.raises(SystemExit, match=r"python -m bench\.doctor run"):
            doctor.main(words)
