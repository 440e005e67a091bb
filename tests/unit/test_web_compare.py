"""The page Compare: runs side by side, a setup with published ones, and the lab's campaigns."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlencode

import pytest

from mule.commands import lab_report
from mule.web.ids import id_of
from mule.web.site import Site
from mule.web.words import linked
from tests.compare_case import write_run
from tests.lab_campaign import Plan, write_campaign
from tests.web_case import RunningUi, ui_running

RECIPE = """\
model: {path: Qwen/Qwen2.5-0.5B}
data: {train: [chats.jsonl], format: messages, max_seq_length: 512}
train: {steps: 100, step_rows: 8}
optim: {learning_rate: 0.0002}
adapter: {kind: lora, lora: {r: 8, alpha: 16}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Runs of two rates with three seeds each, a recipe, and two campaigns: one has no result."""
    work = tmp_path_factory.mktemp("compared")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(work)
        for seed in range(3):
            falling = [3 - step / 20 + seed / 100 for step in range(1, 21)]
            write_run(Path("runs"), f"slow-{seed}", falling, seed=seed)
            faster = [loss - 0.2 - seed / 500 for loss in falling]
            write_run(Path("runs"), f"fast-{seed}", faster, seed=seed, rate=4e-5)
        Path("chats.jsonl").write_text(
            json.dumps({"messages": [{"role": "user", "content": "a"}] * 1}) + "\n"
        )
        Path("mine.yaml").write_text(RECIPE)
        two = {"mha": {}, "<b>gqa": {"attention": "gqa"}}
        write_campaign(Path("campaigns/shapes"), Plan(variants=two, runs=False))
        Path("campaigns/new").mkdir()
        Path("campaigns/new/campaign.yaml").write_text("name: new\n")
        yield work


@pytest.fixture(scope="module")
def pages(folder: Path) -> Iterator[RunningUi]:
    with ui_running(Site()) as running:
        yield running


def shown(pages: RunningUi, path: str) -> str:
    status, headers, body = pages.ask(path)
    assert status == 200, body
    assert headers["content-type"].startswith("text/html")
    return body.decode()


def refused(pages: RunningUi, path: str) -> tuple[int, str]:
    status, _, body = pages.ask(path)
    error = json.loads(body)["error"]
    return status, f"{error['message']} / {error.get('hint')}"


def test_what_can_be_compared_is_listed(pages: RunningUi) -> None:
    page = shown(pages, "/compare")
    assert page.count('name="run"') == 6
    published = shown(pages, "/compare/published")
    assert published.count('name="beside"') > 20 and "Alpaca 7B" in published
    assert "mine.yaml</option>" in page and "run slow-0</option>" in page
    assert 'href="#/compare/shapes"' in page and "0 trained models" in page


def test_a_folder_with_nothing_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with ui_running(Site()) as empty:
        page = shown(empty, "/compare")
    for command in ("mule train RECIPE train.seed=1", "mule init my-tune", "mule lab run"):
        assert command in page


def test_runs_with_runs(pages: RunningUi) -> None:
    names = [f"{kind}-{seed}" for kind in ("slow", "fast") for seed in range(3)]
    page = shown(pages, f"/compare/runs?{urlencode([('run', id_of(n)) for n in names])}")
    assert "optim.learning_rate" in page and "train.seed" in page
    assert "fast-0 against slow-0: validation loss -0.20" in page and "over 3 seeds" in page
    assert "<bdi>fast-0</bdi> − <bdi>slow-0</bdi>" in page and ">yes<" in page
    assert "mule compare runs/slow-0" in page
    assert all(id_of(name) in page for name in names)
    curves = json.loads(pages.ask("/run/slow-0/curves?x=tokens&points=800")[2])
    assert next(chart["name"] for chart in curves["charts"]) == "loss"  # what the page overlays


@pytest.mark.parametrize(
    ("path", "status", "told"),
    [
        ("/compare/runs", 422, "0 runs are chosen / choose two to 8 runs, and compare them"),
        ("/compare/runs?run=slow-0&run=slow-0", 422, "1 runs are chosen"),
        ("/compare/runs?run=slow-0&run=nobody", 404, 'no run "nobody" here'),
        ("/compare/setup", 404, 'no data "" here'),
        ("/compare/setup?of=FILE", 422, "chats.jsonl is no recipe and no run / choose one of"),
        ("/compare/setup?of=RECIPE&beside=nobody", 404, 'no published setup "nobody" here'),
        ("/compare/setup?of=RECIPE" + 7 * "&beside=NAME", 422, "7 published setups are chosen"),
        ("/compare/campaign/nobody", 404, 'no campaign "nobody" here'),
        ("/compare/campaign/new", 422, "campaigns/new has no results yet"),
    ],
)
def test_what_cannot_be_compared(pages: RunningUi, path: str, status: int, told: str) -> None:
    names = {"FILE": "file/chats.jsonl", "RECIPE": "recipe/mine.yaml"}
    for word, name in names.items():
        path = path.replace(word, id_of(name))
    known = re.findall(r'name="beside" value="([^"]+)"', shown(pages, "/compare/published"))
    found = refused(pages, path.replace("NAME", known[0]))
    assert found[0] == status and told in found[1]


def test_a_setup_with_published_ones(pages: RunningUi) -> None:
    of = id_of("recipe/mine.yaml")
    nearest = shown(pages, f"/compare/setup?of={of}")
    assert nearest.count('<th scope="col">') >= 5 + 3 and "learning rate" in nearest
    assert "rests on" in nearest
    links = re.findall(r"<a [^>]*>", nearest)
    assert links and all('rel="noreferrer noopener"' in link for link in links)
    for address, text in re.findall(r'<a href="([^"]+)"[^>]*>([^<]*)</a>', nearest):
        assert address == text and address.startswith("https://")
    alpaca = shown(pages, f"/compare/setup?of={of}&beside=alpaca-7b")
    assert "beside Alpaca 7B</h2>" in alpaca
    run = shown(pages, f"/compare/setup?of={id_of('run/slow-0')}&beside=alpaca-7b")
    assert "mule compare runs/slow-0 alpaca-7b" in run


def test_addresses_in_a_text_are_found_and_no_script_is_one() -> None:
    told = linked("see https://a.example/x_(y), or (http://b.example). javascript:alert(1)")
    assert [part for part, is_link in told if is_link] == [
        "https://a.example/x_(y",
        "http://b.example",
    ]
    assert "".join(part for part, _ in told).endswith(". javascript:alert(1)")
    assert linked("") == []


def test_a_campaign_is_shown_with_its_plots_and_nothing_is_written(
    folder: Path, pages: RunningUi
) -> None:
    before = sorted(folder.glob("campaigns/shapes/*"))
    page = shown(pages, "/compare/campaign/shapes")
    assert page.count("data:image/svg+xml;base64,") >= 1 and page.count("<caption>") >= 3
    assert "&lt;b&gt;gqa" in page and "<b>gqa" not in page
    assert all("alt=" in image for image in re.findall(r"<img [^>]*>", page))
    assert "mule lab report campaigns/shapes" in page
    assert sorted(folder.glob("campaigns/shapes/*")) == before


def test_the_campaigns_of_a_folder(folder: Path) -> None:
    rows = lab_report.list_campaigns()["campaigns"]
    assert {row["campaign"]: row["results"] for row in rows} == {"shapes": 6, "new": 0}
    report = lab_report.read(Path("campaigns/shapes"))
    kinds = {block["kind"] for section in report["sections"] for block in section["blocks"]}
    assert kinds == {"text", "items", "table", "figures"}


def test_the_server_loads_no_torch_for_it() -> None:
    code = (
        "import sys; from mule.web import app; from mule.lab import report; "
        "from mule.commands import compare, data_rows; import mule.data.contract; "
        "import mule.compare.catalogue, mule.compare.side_by_side; "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
