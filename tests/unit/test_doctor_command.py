"""`mule doctor` and report.md, read as a user would."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from mule import fsio
from mule.cli.main import app
from mule.commands import docs_doctor, doctor
from mule.doctor.examine import examination, examine
from mule.doctor.finding import ALL_KINDS
from mule.doctor.history import History, read_history
from mule.doctor.phases import recent
from mule.doctor.rules import all_rules, rule_texts
from mule.run import Run
from tests.doctor_case import curve, history, run_folder

NAN = {"kind": "update refused", "cause": "loss nan, gradient norm nan"}
LINEAGE = {"recipe": "1" * 64, "data": "train-1", "tokenizer": "2" * 64}


def _mule(*words: str) -> tuple[int, str]:
    ran = CliRunner().invoke(app, ["doctor", *words])
    return ran.exit_code, ran.output


def _broken() -> History:
    events = [NAN | {"step": 40}, NAN | {"step": 90}]
    return history("fine-tune", events=events, valid=curve(2.6, 1.7, 20))


# ---------------------------------------------------------------- the command


def test_a_healthy_run(tmp_path: Path) -> None:
    run = run_folder(tmp_path, history(valid=curve(6.8, 2.5, 15)))
    code, text = _mule(str(run.folder))
    assert code == 0
    assert "case: pretrain, update 200 of 200, finished: healthy" in text
    assert "looked at by" in text and "D101, D102" in text
    assert f"next: mule doctor {run.folder} --report" in text


def test_an_alarm_is_told_with_its_remedy_and_the_exit_code(tmp_path: Path) -> None:
    run = run_folder(tmp_path, _broken())
    code, text = _mule(str(run.folder))
    assert code == 1
    assert "1 alarm" in text
    assert "alarm  D101 not a number, since update 40" in text
    assert "try  optim.learning_rate=0.0005" in text
    assert "next: mule doctor --explain D101" in text
    code, text = _mule(str(run.folder), "--json")
    found = json.loads(text.splitlines()[-1])
    assert code == 1 and found["ok"] is False and found["kind"] == "fine-tune"
    assert found["findings"][0]["evidence"]["updates"] == [40, 90]


def test_what_could_not_look_is_said(tmp_path: Path) -> None:
    case = history()
    for row in case.rows:
        del row["grad_norm"]
    code, text = _mule(str(run_folder(tmp_path, case).folder))
    assert code == 0 and "could not look, without grad_norm: D201" in text


def test_a_run_that_never_began(tmp_path: Path) -> None:
    Run.create(tmp_path, "new", "name: new\n")
    code, text = _mule(str(tmp_path / "new"))
    assert code == 2 and "there is nothing to examine" in text and "--resume" in text


def test_a_rule_explains_itself() -> None:
    code, text = _mule("--explain", "d104")
    assert code == 0 and text.startswith("D104 loss diverging")
    for heading in doctor.HEADINGS:
        assert f"\n{heading}\n" in text
    code, text = _mule("--explain", "D1O4")
    assert code == 2 and "there is no rule `D1O4`" in text and "did you mean D104" in text


def test_all_rules_are_listed() -> None:
    code, text = _mule("--rules")
    assert code == 0 and all(rule.code in text for rule in all_rules())


@pytest.mark.parametrize("words", [(), ("a-run", "--rules"), ("--explain", "D101", "--rules")])
def test_it_takes_one_thing_at_a_time(words: tuple[str, ...]) -> None:
    code, text = _mule(*words)
    assert code == 2 and "takes a run, --explain CODE, --rules or --env, not" in text


# ---------------------------------------------------------------- the framework


def test_every_rule_is_explained_and_named_once() -> None:
    codes = [rule.code for rule in all_rules()]
    assert codes == sorted(set(codes))
    for rule in all_rules():
        summary, sections = doctor.explanation(rule)
        assert list(sections) == list(doctor.HEADINGS), rule.code
        assert summary.endswith(".") and all(len(text) > 20 for text in sections.values())
        assert rule_texts()[rule.code] and set(rule.kinds) <= set(ALL_KINDS)


def test_the_page_of_rules_links_each_to_its_text() -> None:
    page = docs_doctor.rules_markdown()
    for rule in all_rules():
        assert f"### {rule.code} {rule.title}\n" in page
    assert "[D104](#d104-loss-diverging)" in page


def test_findings_come_the_gravest_first() -> None:
    case = history(
        events=[NAN | {"step": 190}, NAN | {"step": 191}], settings=["optim.warmup_steps=80"]
    )
    severities = [finding.found.severity for finding in examine(case)]
    assert severities[:2] == ["alarm", "warning"]


def test_a_run_of_another_time_has_no_facts(tmp_path: Path) -> None:
    found = examination(read_history(run_folder(tmp_path, history())))
    assert not [finding for finding in found.findings if finding.found.severity != "note"]


def test_events_of_updates_made_again_are_forgotten(tmp_path: Path) -> None:
    run = run_folder(tmp_path, history(until=100, events=[NAN | {"step": 90}, NAN | {"step": 95}]))
    assert examine(read_history(run))[0].code == "D101"
    with run.lock():
        run.start_attempt(from_step=80)
        for row in history(until=100).rows[80:]:
            run.log_metrics(row)
    assert not [f for f in examine(read_history(run)) if f.code == "D101"]


def test_until_knows_what_was_known_then() -> None:
    case = _broken()
    assert case.until(30).step == 30 and not case.until(30).is_over
    assert not [f for f in examine(case.until(30)) if f.code == "D101"]
    assert len(recent(case.until(30).series("loss"))) == 8


# ---------------------------------------------------------------- report.md


def _report(run: Run, **options: Any) -> str:
    from mule.commands.report import write_report

    return write_report(run, **options).read_text(encoding="utf-8")


def test_a_report_tells_all_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    samples = [
        {"step": step, "answers": {"Who are you?": text}}
        for step, text in ((0, "the the the"), (200, "I am a mule."))
    ]
    case = history("fine-tune", valid=lambda s: 1.9 + abs(s - 120) / 400, samples=samples)
    run = run_folder(tmp_path / "runs", case)
    text = _report(run)
    assert "Trained: all weights of `base`; 200 of 200 updates" in text
    assert "The training loss went from 2." in text
    assert "it was lowest after update 120 (1.900): use that checkpoint" in text
    assert "| validation loss | 2.1500 | 1.9000 | 2.1500 | 2.1000 |" in text
    assert "at first: `the the the`" in text and "at the end: `I am a mule.`" in text
    assert "- [x] **base**: `base`" in text
    assert f"- [ ] **deploy**: no file has been exported; next: `mule export {run.folder}`" in text
    assert "![loss, learning rate, gradient norm and memory](report.svg)" in text
    assert "</svg>" in (run.folder / "report.svg").read_text()
    code, shown = _mule(str(run.folder), "--report")
    assert code == 0 and f"report  {run.folder}/report.md" in shown


def test_a_report_names_what_was_found(tmp_path: Path) -> None:
    text = _report(run_folder(tmp_path, _broken()), curves=False)
    assert "**1 alarm.**" in text
    assert (
        "- **alarm: not a number** (D101), since update 40: 2 of 200 updates were refused" in text
    )
    assert "--report` draws the curves" in text


def test_a_report_without_matplotlib_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    assert "pip install matplotlib" in _report(run_folder(tmp_path, history()))


def test_a_report_of_a_run_without_figures(tmp_path: Path) -> None:
    run = run_folder(tmp_path, history(num_steps=4))
    fsio.write_text(run.folder / "metrics.jsonl", "")
    assert "No update was made that could be measured." in _report(run)


def test_a_report_follows_an_adapter_to_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = run_folder(tmp_path / "runs", history("adapter"))
    run.write_lineage(LINEAGE)
    text = _report(run, curves=False)
    assert "- [ ] **merge**: the adapter is apart from its base; next: `mule merge" in text
    merged = LINEAGE | {"merge": {"merged_against_adapter": 4e-6}}
    fsio.write_json(tmp_path / "exports/case/merged/lineage.json", merged)
    fsio.write_json(tmp_path / "exports/other/lineage.json", merged | {"data": "train-2"})
    file: dict[str, Any] = {"file": "case-Q8_0.gguf"}
    record = {"lineage": LINEAGE, "files": [file]}
    fsio.write_json(tmp_path / "exports/case/export.json", record)
    text = _report(run, curves=False)
    assert "[x] **merge**: `exports/case/merged`, its logits at most 4.0e-06 from" in text
    assert "not verified yet; next: `mule verify exports/case`" in text
    file["check"] = {"ok": False}
    fsio.write_json(tmp_path / "exports/case/export.json", record)
    assert "verification failed; next: `mule verify exports/case`" in _report(run, curves=False)
    file["check"] = {"ok": True}
    fsio.write_json(tmp_path / "exports/case/export.json", record)
    text = _report(run, curves=False)
    assert "[x] **deploy**: `exports/case/case-Q8_0.gguf`, verified; next: `mule chat" in text
