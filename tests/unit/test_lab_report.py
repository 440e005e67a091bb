"""`mule lab report` on synthetic campaigns: planted effects, planted noise, bad folders, its page."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner

from mule.cli.main import app
from mule.commands import lab_report
from mule.errors import UserError
from mule.lab.findings import gather
from mule.lab.records import read_study
from tests.lab_campaign import VARIANTS, Plan, kv_bytes, settings_of, write_campaign

_EFFECTS = {"gqa": 0.0, "mqa": 0.0, "gqa-moe": -0.08, "gqa-moe-cap": -0.05}
_EFFECTS |= {"mamba2": 0.04, "hybrid": -0.03}


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A whole campaign with planted effects, and what the report says of it."""
    folder = tmp_path_factory.mktemp("lab") / "whole"
    write_campaign(folder, Plan(effects=_EFFECTS, noise=0.001, steps=900))
    return folder, lab_report.run(folder)


def _bare(folder: Path, **settings: Any) -> Path:
    """A small campaign of results alone."""
    variants = {name: VARIANTS[name] for name in ("mha", "gqa", "mqa", "gqa-moe")}
    plan = Plan(**{"variants": variants, "runs": False, "measured": False, **settings})
    return write_campaign(folder, plan)


def _by_technique(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["technique"]: row for row in found["differences"]}


# ---------------------------------------------------------------- what it finds


def test_planted_effects_are_found_and_noise_is_not(
    reported: tuple[Path, dict[str, Any]],
) -> None:
    rows = _by_technique(reported[1])
    assert {name: row["verdict"] for name, row in rows.items()} == {
        "MHA → GQA": "no measurable difference",
        "GQA → MQA": "no measurable difference",
        "GQA → GQA + MoE": "better",
        "dropless → capacity": "worse",
        "attention → Mamba-2": "worse",
        "Mamba-2 → hybrid": "better",
    }
    moe = rows["GQA → GQA + MoE"]
    assert moe["difference"]["mean"] == pytest.approx(-0.08, abs=0.004)
    assert (moe["first"], moe["second"], moe["seeds"]) == ("gqa", "gqa-moe", [0, 1, 2])
    assert re.fullmatch(
        r"gqa-moe is better than gqa by 0\.0\d{3} ± 0\.0\d{3} nats \(beyond seed noise, 3 seeds\)",
        moe["told"],
    )
    none = rows["MHA → GQA"]
    assert "smaller than what 3 seeds can show, which is 0.0" in none["told"]
    assert abs(none["difference"]["mean"]) < none["detectable"]


def test_the_ranking_is_by_mean_and_against_the_baseline(
    reported: tuple[Path, dict[str, Any]],
) -> None:
    found = reported[1]
    assert [row["arm"] for row in found["ranking"]][:3] == ["gqa-moe", "gqa-moe-cap", "hybrid"]
    assert [row["rank"] for row in found["ranking"]] == list(range(1, 8))
    first = found["ranking"][0]
    assert first["against_baseline"]["mean"] == pytest.approx(-0.08, abs=0.004)
    # Seeds move all variants alike: pairs know more than the means' own intervals.
    assert first["against_baseline"]["half_width"] < 0.5 * first["test"]["loss"]["half_width"]
    assert Path(found["best_run"]).parent.name == "runs"
    assert found["next"] == f"mule export {found['best_run']}"


def test_false_alarms_are_as_rare_as_promised(tmp_path: Path) -> None:
    alarms = 0
    for chance in range(40):
        folder = _bare(tmp_path / str(chance), chance=chance)
        rows = gather(read_study(folder)).found["differences"]
        alarms += any(row["verdict"] in ("better", "worse") for row in rows)
    assert alarms <= 7  # of 40 at 5%: more than 7 in one of 500 series


def test_no_difference_anywhere_is_the_conclusion(tmp_path: Path) -> None:
    lab_report.run(_bare(tmp_path / "none", chance=3))
    text = (tmp_path / "none/report.md").read_text(encoding="utf-8")
    assert "No technique makes a measurable difference here" in text


def test_sizes_are_compared_apart_and_drawn_together(tmp_path: Path) -> None:
    variants = {name: VARIANTS[name] for name in ("mha", "gqa-moe")}
    folder = _bare(
        tmp_path / "sizes", variants=variants, sizes=("3m", "6m"), effects={"gqa-moe": -0.1}
    )
    found = lab_report.run(folder)
    told = {(row["first"], row["second"]): row["verdict"] for row in found["differences"]}
    assert told == {("mha 3m", "gqa-moe 3m"): "better", ("mha 6m", "gqa-moe 6m"): "better"}
    assert "Loss against parameters" in (folder / "report.md").read_text(encoding="utf-8")
    drawn = {file.stem for file in (folder / "report-figures").iterdir()}
    assert drawn == {"loss-parameters", "ranking", "techniques", "training-speed"}


def test_routing_is_told_by_layer_and_over_time(reported: tuple[Path, dict[str, Any]]) -> None:
    folder, found = reported
    capped = next(row for row in found["experts"] if row["arm"] == "gqa-moe-cap")
    assert capped["dead_experts"] == [1, 1, 1]
    assert capped["dropped"]["mean"] == pytest.approx(0.2 * 0.073, abs=0.005)
    assert capped["worst_violation"]["layer"] == 0
    text = (folder / "report.md").read_text(encoding="utf-8")
    assert "gqa-moe, share dropped: 0 in every layer" in text
    drawn = {file.stem for file in (folder / "report-figures").iterdir()}
    assert {"experts-gqa-moe", "experts-time-gqa-moe", "aux-loss-gqa-moe"} <= drawn
    assert {"dropped-gqa-moe-cap", "z-loss-gqa-moe-cap", "entropy-gqa-moe"} <= drawn


def test_the_cache_is_what_the_formula_says(reported: tuple[Path, dict[str, Any]]) -> None:
    text = (reported[0] / "report.md").read_text(encoding="utf-8")
    row = next(line for line in text.splitlines() if line.startswith("| hybrid | 512 B"))
    assert kv_bytes(settings_of(VARIANTS["hybrid"])) == 512
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[1:6] == ["512 B", "512 B", "8.3%", "2 / 8", "98,304 B"]


# ---------------------------------------------------------------- partial campaigns


def test_a_partial_campaign_says_what_is_missing(tmp_path: Path) -> None:
    folder = _bare(tmp_path / "part", runs=True, effects={"mqa": 0.1})
    for gone in ("mqa-s2", "gqa-moe-s0", "gqa-moe-s1", "gqa-moe-s2"):
        (folder / "results" / f"{gone}.json").unlink()
    shutil.rmtree(folder / "runs/gqa-s1")
    found = lab_report.run(folder)
    assert found["missing"] == [
        "gqa-moe: no result",
        "gqa: the run's folder, and so its curves, of seed 1",
        "mqa: no result of seed 2",
        "decoding: not measured for mha, gqa, mqa",
    ]
    assert _by_technique(found)["GQA → MQA"]["seeds"] == [0, 1]
    assert any("fewer than 3 seeds with a test loss: mqa" in told for told in found["warnings"])
    text = (folder / "report.md").read_text(encoding="utf-8")
    for told in ("Decoding was not measured", "Compiling was not measured", "no result of seed 2"):
        assert told in text


def test_a_diverged_run_is_left_out_and_named(tmp_path: Path) -> None:
    folder = _bare(tmp_path / "nan")
    file = folder / "results/gqa-s1.json"
    record = json.loads(file.read_text())
    record["test"]["loss"] = None
    file.write_text(json.dumps(record))
    found = lab_report.run(folder)
    assert "gqa: no finite test loss of seed 1" in found["missing"]
    assert _by_technique(found)["MHA → GQA"]["seeds"] == [0, 2]


def test_one_seed_gives_no_verdict(tmp_path: Path) -> None:
    found = lab_report.run(_bare(tmp_path / "one", seeds=(4,), effects={"mqa": 1.0}))
    assert {row["verdict"] for row in found["differences"]} == {"not known"}
    assert (
        "in one seed; without a second one seed noise is not known"
        in found["differences"][0]["told"]
    )
    text = (tmp_path / "one/report.md").read_text(encoding="utf-8")
    assert "the order below may be chance" in text


def test_few_updates_and_other_settings_are_warned_of(tmp_path: Path) -> None:
    folder = _bare(tmp_path / "odd", runs=True, steps=300)
    file = folder / "runs/gqa-s0/resolved.yaml"
    settings = json.loads(file.read_text())
    settings["optim"]["weight_decay"] = 0.3
    file.write_text(json.dumps(settings))
    lineage = folder / "runs/mqa-s2/lineage.json"
    lineage.write_text(json.dumps(json.loads(lineage.read_text()) | {"data": "train-2e"}))
    shape = json.loads((folder / "results/mha-s0.json").read_text())["shape"]
    _changed(folder, "mqa-s0", shape=shape | {"active_params": 6_600_000})
    told = " ".join(lab_report.run(folder)["warnings"])
    assert "active parameters differ by 10.0%, from gqa-moe (6,000,000) to mqa" in told
    assert "runs of one seed were trained on different prepared data" in told
    assert "step-starved: " in told
    assert "are 300 updates, few to learn in" in told
    assert "optim.weight_decay is not the same for all variants: 0.1, 0.3" in told


def _searched(folder: Path, search: dict[str, Any], chosen: dict[str, float]) -> None:
    """A folder of a campaign whose variants, mha and gqa, were searched; mha chose `chosen`."""
    asked = json.loads((folder / "campaign.yaml").read_text())
    (folder / "campaign.yaml").write_text(json.dumps(asked | {"search": search}))
    tried = [{name: value * factor for name, value in chosen.items()} for factor in (1, 0.5, 2)]
    losses = [4.1, 4.3, None]
    rows = [one | {"valid_loss": loss, "run": "r"} for one, loss in zip(tried, losses)]
    rows[2]["diverged"] = "updates were refused"
    table: dict[str, Any] = {"seed": 0, "tokens": 61_440, "sampler": "optuna 5.0.0"}
    table |= {"ranges": {name: [1e-4, 1e-1] for name in chosen}, "rows": rows, "chosen": chosen}
    (folder / "search").mkdir()
    for name, edge in (
        ("mha", ["learning rate 0.1, at the upper end of 0.0001 to 0.1"]),
        ("gqa", []),
    ):
        own = {"variant": name, "size": "", **table, "at_edge": edge}
        (folder / "search" / f"{name}.json").write_text(json.dumps(own))
        (folder / "search" / f"search-{name}-try01.json").write_text("{}")


def test_a_search_is_told(tmp_path: Path) -> None:
    variants = {name: VARIANTS[name] for name in ("mha", "gqa")}
    folder = _bare(tmp_path / "searched", runs=True, variants=variants, seeds=(0, 1))
    search = {"learning_rates": [], "trials": 3, "learning_rate": [1e-4, 1e-1]}
    _searched(folder, search, {"learning_rate": 3e-3})
    for name, rate in (("mha", 3e-3), ("gqa", 1e-3)):
        for seed in (0, 1):
            file = folder / f"runs/{name}-s{seed}/resolved.yaml"
            settings = json.loads(file.read_text())
            settings["optim"]["learning_rate"] = rate
            file.write_text(json.dumps(settings))
    found = lab_report.run(folder)
    assert [row["arm"] for row in found["searches"]] == ["mha", "gqa"]
    told = " ".join(found["warnings"])
    assert "optim.learning_rate is not the same" not in told
    assert (
        "the search of mha chose a learning rate 0.1, at the upper end of 0.0001 to 0.1: a" in told
    )
    page = (folder / "report.md").read_text(encoding="utf-8")
    assert (
        "Each variant has its own learning rate: of the try with the lowest validation loss of 3"
        in page
    )
    assert "short runs of 61,440 tokens from seed 0, sampled by optuna 5.0.0 (TPE)" in page
    assert "| mha | 0.003 | 4.1000 | 4.3000 | 1 | learning rate 0.1, at the upper end" in page
    assert "| mha | 0.003 | 4.1000 (chosen) |" in page and "| gqa | 0.006 | diverged |" in page
    assert "| learning rate | searched |" in page
    assert "tokenizers and optimizer settings that were not searched are not varied" in page
    (folder / "search" / "gqa.json").unlink()
    assert "the search: not measured for gqa" in lab_report.run(folder)["missing"]


# ---------------------------------------------------------------- folders that are refused


def test_a_folder_without_results_teaches(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no such folder") as error:
        lab_report.run(tmp_path / "nowhere")
    assert "mule lab run" in error.value.hint
    with pytest.raises(UserError, match="is no campaign's folder"):
        lab_report.run(tmp_path)
    (tmp_path / "campaign.yaml").write_text("variants: {mha: {}}\n")
    with pytest.raises(UserError, match="has no results yet") as error:
        lab_report.run(tmp_path)
    assert "mule lab run" in error.value.hint
    assert not (tmp_path / "report.md").exists()
    (tmp_path / "campaign.yaml").write_text("variants: {mha: {}\n")
    with pytest.raises(UserError, match=r"campaign\.yaml:\d+: "):
        lab_report.run(tmp_path)


def _changed(folder: Path, name: str, **changes: Any) -> Path:
    file = folder / "results" / f"{name}.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return file


def test_what_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    folder = _bare(tmp_path / "c")
    _changed(folder, "gqa-s1", tokens=5_000_000)
    with pytest.raises(UserError, match=r"gqa-s1 on 5,000,000|gqa-s1 was trained on 5,000,000"):
        lab_report.run(folder)
    folder = _bare(tmp_path / "d")
    _changed(folder, "mqa-s0", test={"loss": 4.0, "num_tokens": 77})
    with pytest.raises(UserError, match=r"was tested on .* tokens, .* losses cannot be compared"):
        lab_report.run(folder)
    folder = _bare(tmp_path / "e")
    _changed(folder, "mqa-s0", seed=1)
    with pytest.raises(UserError, match="are both mqa, seed 1: two campaigns are mixed") as error:
        lab_report.run(folder)
    assert "move the others away" in error.value.hint
    folder = _bare(tmp_path / "f")
    _changed(folder, "mqa-s0", variant="rwkv")
    with pytest.raises(UserError, match="of the variant rwkv, which the campaign does not have"):
        lab_report.run(folder)
    folder = _bare(tmp_path / "g")
    _changed(folder, "mqa-s0", steps=None)
    with pytest.raises(UserError, match="no result of a campaign: it lacks steps"):
        lab_report.run(folder)


def test_runs_of_two_tokenizers_are_refused(tmp_path: Path) -> None:
    folder = _bare(tmp_path / "t", runs=True)
    file = folder / "runs/gqa-s0/lineage.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tokenizer": "other"}))
    with pytest.raises(UserError, match="2 different tokenizers"):
        lab_report.run(folder)


# ---------------------------------------------------------------- the files


class _Page(HTMLParser):
    """What a page refers to, and whether its elements are closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in ("meta", "link", "img"):
            self.open.append(tag)
        for name, value in attrs:
            if name in ("href", "src", "xlink:href") and value:
                self.links.append(value)
            if name == "id" and value:
                self.ids.append(value)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_stands_alone_and_can_be_read_aloud(
    reported: tuple[Path, dict[str, Any]],
) -> None:
    html = (reported[0] / "report.html").read_text(encoding="utf-8")
    page = _Page()
    page.feed(html)
    assert page.open == []
    assert len(set(page.ids)) == len(page.ids)
    assert all(link.startswith("#") and link[1:] in page.ids for link in page.links)
    assert not re.findall(r"<script|@import|url\((?!#)|javascript:", html)
    addresses = set(re.findall(r"https?://[^\s\"'<]+", html))
    assert addresses == {"http://www.w3.org/2000/svg"}  # a namespace, not fetched
    figures = re.findall(r"<svg.*?</svg>", html, re.S)
    assert len(figures) > 20
    for svg in figures:
        root = ElementTree.fromstring(svg)
        parts = {child.tag.partition("}")[2]: child for child in root}
        assert len(parts["title"].text or "") > 5
        assert len(parts["desc"].text or "") > 20
        named = (root.get("aria-labelledby") or "").split()
        assert named == [parts["title"].get("id"), parts["desc"].get("id")]
        assert "NaN" not in svg
    assert page.tags.count("table") == page.tags.count("caption") == page.tags.count("thead")
    assert "prefers-color-scheme: dark" in html
    assert 'name="viewport"' in html


def test_the_markdown_has_whole_tables_and_its_pictures(
    reported: tuple[Path, dict[str, Any]],
) -> None:
    folder = reported[0]
    lines = (folder / "report.md").read_text(encoding="utf-8").splitlines()
    width = 0
    for line in lines:
        if not line.startswith("|"):
            width = 0
            continue
        cells = len(re.findall(r"(?<!\\)\|", line))
        assert width in (0, cells), line
        width = cells
    pictures = re.findall(r"\]\((report-figures/[^)]+)\)", "\n".join(lines))
    assert len(pictures) > 20
    for name in pictures:
        ElementTree.parse(folder / name)
        assert "prefers-color-scheme" in (folder / name).read_text(encoding="utf-8")
    there = {f"report-figures/{file.name}" for file in (folder / "report-figures").iterdir()}
    assert there == set(pictures)


def test_names_cannot_break_the_page(tmp_path: Path) -> None:
    folder = _bare(tmp_path / "x")
    file = folder / "campaign.yaml"
    asked = json.loads(file.read_text()) | {"name": "<script>alert(1)</script> a|b *c*"}
    file.write_text(json.dumps(asked))
    lab_report.run(folder)
    html = (folder / "report.html").read_text(encoding="utf-8")
    assert "<script" not in html
    assert "&lt;script&gt;" in html
    text = (folder / "report.md").read_text(encoding="utf-8")
    assert "<script" not in text


def test_a_report_is_the_same_again_and_leaves_no_old_pictures(
    reported: tuple[Path, dict[str, Any]],
) -> None:
    folder = reported[0]
    before = {f.name: f.read_bytes() for f in (folder / "report.md", folder / "report.html")}
    (folder / "report-figures/old.svg").write_text("<svg/>")
    lab_report.run(folder)
    assert before == {name: (folder / name).read_bytes() for name in before}
    assert not (folder / "report-figures/old.svg").exists()


def test_the_command_shows_the_verdicts_and_prints_json(tmp_path: Path) -> None:
    folder = _bare(tmp_path / "c", effects={"gqa-moe": -0.1})
    ran = CliRunner().invoke(app, ["lab", "report", str(folder), "--json"])
    assert ran.exit_code == 0, ran.output
    found = json.loads(ran.stdout.splitlines()[-1])
    assert found["ranking"][0]["arm"] == "gqa-moe"
    assert found["differences"][0]["detectable"] > 0
    assert "GQA → GQA + MoE: gqa-moe is better than gqa by" in ran.stderr
    assert "next: mule lab run" in ran.stderr
    ran = CliRunner().invoke(app, ["lab", "report", str(folder / "results")])
    assert ran.exit_code == 2
    assert "is no campaign's folder" in ran.output
