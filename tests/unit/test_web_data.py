"""The page Data: what can be chosen, the report, and the rows, whatever stands in them."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from mule.commands import data_charts, data_check, data_found, data_rows
from mule.commands.preview_text import visible
from mule.data.sources.options import ReadOptions
from mule.errors import UserError
from mule.tokenizer import Tokenizer
from mule.web.ids import id_of
from mule.web.jobs import Jobs
from mule.web.kept import Kept, key_of
from mule.web.site import Site
from tests.compare_case import write_run
from tests.web_case import RunningUi, ui_running

EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)>\u202e\x1b[31m{{7*7}} &amp;"
EVIL_NAME = "data/<img src=x onerror=alert(3)>\u202e.jsonl"
SHORT = {"role": "user", "content": "Which way is it to the station?"}


def talk(answer: str, question: str = SHORT["content"]) -> dict[str, Any]:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": turns}


def write(path: str, rows: list[Any]) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    Path(path).write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Forty rows: one hostile, one of a megabyte, one broken, one that repeats; and a neighbour."""
    place = tmp_path_factory.mktemp("data")
    (place / "work").mkdir()
    (place / "secret.jsonl").write_text(json.dumps(talk("the canary")) + "\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place / "work")
        rows: list[Any] = [talk(f"Go left at the crossing number {n}.") for n in range(40)]
        rows[3] = talk(EVIL, EVIL)
        rows[5] = talk("so " * 70_000)
        rows[6] = talk("left " * 2000)
        rows[8] = '{"messages": <b>oops</b>'
        rows[20] = rows[19]
        write("data/train.jsonl", rows)
        write(
            "data/valid.jsonl",
            [talk("Ask the king.", f"Who are you, number {n}?") for n in range(4)],
        )
        write(EVIL_NAME, rows[:2])
        write("README.md", ["no data"])
        write("model/tokenizer.json", ["{}"])
        write("model/train.jsonl", rows[:1])
        os.symlink(place / "secret.jsonl", "leads-out.jsonl")
        Path("mine.yaml").write_text("model: {size: 1m}\ndata: {train: [data], format: messages}\n")
        Path("hub.yaml").write_text("model: {size: 1m}\ndata: {train: [hf://datasets/a/b]}\n")
        Path("chats.jsonl").write_text(json.dumps(talk("A run was trained on this.")) + "\n")
        write("long.jsonl", [talk("so " * 350_000)])
        run = write_run(Path("runs"), "grey-mare", [3.0, 2.0])
        Tokenizer.train(["the way to the station"] * 9, 300).save(run.folder / "tokenizer")
        yield place / "work"


@pytest.fixture(scope="module")
def checked(folder: Path) -> dict[str, Any]:
    """The result of a check, kept as its job would have: the page starts none."""
    found = data_check.run(["data"], places=1000)
    site = Site()
    located = data_rows.locate(["data"])
    words = ["data", "check", "data", "--places", "1000", "--json"]
    file = (
        site.jobs.folder.with_name("results")
        / f"{key_of(words, [f for _, f in located.files])}.json"
    )
    write(str(file), [{"result": found}])
    return found


@pytest.fixture(scope="module")
def pages(folder: Path) -> Iterator[RunningUi]:
    with ui_running(Site(read_only=True)) as running:
        yield running


DATA = id_of("folder/data")
TRAIN = id_of("file/data/train.jsonl")


def shown(pages: RunningUi, path: str) -> str:
    status, _, body = pages.ask(path)
    assert status == 200, body
    return body.decode()


def refused(pages: RunningUi, path: str) -> tuple[int, str]:
    status, _, body = pages.ask(path)
    error = json.loads(body)["error"]
    return status, f"{error['message']} / {error.get('hint')}"


class Elements(HTMLParser):
    """The elements of a fragment, their attributes, and its text."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.text = ""
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data: str) -> None:
        self.text += data


# ---------------------------------------------------------------- what can be chosen


def test_data_recipes_and_runs_are_found(folder: Path, pages: RunningUi) -> None:
    found = data_found.run()
    assert found["folders"] == ["data"] and found["recipes"] == ["hub.yaml", "mine.yaml"]
    names = [file["file"] for file in found["files"]]
    assert "leads-out.jsonl" not in names  # nor README.md, nor what a model's folder holds
    assert names == [
        "chats.jsonl",
        "long.jsonl",
        *sorted(os.path.join("data", n) for n in os.listdir("data")),
    ]
    assert found["runs"] == ["grey-mare"] and found["tokenizers"] == ["runs/grey-mare", "model"]
    page = shown(pages, "/data")
    assert f'href="#/data/{TRAIN}"' in page and "mine.yaml" in page and "grey-mare" in page
    assert "<img" not in page and "&lt;img src=x onerror=alert(3)&gt;‹U+202E›.jsonl" in page


def test_what_came_with_mule_is_not_the_users(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("docs/a.jsonl", "bench/b.json", "mine/docs/c.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    for name in ("recipes/of-mule.yaml", "recipes/run.yaml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("data: {}\n")
    assert len(data_found.run(tmp_path)["files"]) == 3
    monkeypatch.setattr(data_found, "_CLONE", tmp_path.resolve())
    monkeypatch.setattr("mule.config.presets._FOLDERS", [tmp_path / "recipes"])
    (tmp_path / "recipes/run.yaml").rename(tmp_path / "run.yaml")
    found = data_found.run(tmp_path)
    assert [row["file"] for row in found["files"]] == [str(tmp_path / "mine/docs/c.jsonl")]
    assert found["recipes"] == [str(tmp_path / "run.yaml")]


def test_an_empty_folder_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with ui_running(Site()) as empty:
        assert "No data here yet." in (page := shown(empty, "/data"))
    assert "mule init my-tune" in page


def test_a_folder_deeper_than_is_looked_at_says_so(tmp_path: Path) -> None:
    deep = tmp_path / "a/b/c/d/e/f"
    deep.mkdir(parents=True)
    found = data_found.run(tmp_path)
    assert found["more"] and not found["files"]


def test_what_is_typed_stays_in_the_folder(pages: RunningUi) -> None:
    for path in ("data/train.jsonl", "./data", "data/../chats.jsonl", str(Path.cwd() / "data")):
        found = json.loads(pages.ask(f"/data/find?path={quote(path)}")[2])
        assert found["id"].startswith("path-"), found
        assert pages.ask(f"/data/{found['id']}")[0] == 200
    outside = ("../secret.jsonl", "/etc/passwd", "leads-out.jsonl", "data/../../secret.jsonl", "")
    for path in outside:
        status, told = refused(pages, f"/data/find?path={quote(path)}")
        assert status == 422 and "is not below the folder that mule ui shows / name a file" in told
    for path in ("nowhere.jsonl", "a" * 999, "data\0.jsonl"):
        status, told = refused(pages, f"/data/find?path={quote(path)}")
        assert status == 422 and "is nothing in the folder" in told


@pytest.mark.parametrize(
    ("path", "status", "told"),
    [
        ("/data/nothing", 404, 'no data "nothing" here / choose it again on the page Data'),
        (f"/data/{DATA}/rows?file=9", 404, "there are 2 files"),
        (f"/data/{DATA}/rows?start=x", 422, "start is no whole number / start=0"),
        (f"/data/{DATA}/rows?start=-1", 422, "start is no whole number"),
        (f"/data/{DATA}/rows?problem=99", 404, "the report has "),
        (f"/data/{DATA}/rows?reader=nobody", 404, 'no tokenizer "nobody" here'),
        (f"/data/{TRAIN}/prepared", 422, "no rows were prepared for it / mule data prepare"),
        (
            f"/data/{id_of('recipe/hub.yaml')}",
            422,
            "is data of the hub, and a page fetches nothing",
        ),
    ],
)
def test_what_cannot_be_shown(
    checked: dict[str, Any], pages: RunningUi, path: str, status: int, told: str
) -> None:
    found = refused(pages, path)
    assert found[0] == status and told in found[1], found


def test_a_read_only_server_starts_no_check(pages: RunningUi) -> None:
    page = shown(pages, f"/data/{TRAIN}/report")
    assert "This server only shows." in page and "mule data check data/train.jsonl" in page
    assert "data-at-once" not in page
    for part in ("check", "stats"):
        assert pages.ask(f"/data/{TRAIN}/{part}", {})[0] == 403


# ---------------------------------------------------------------- the report


def test_the_report(checked: dict[str, Any], pages: RunningUi) -> None:
    page = shown(pages, f"/data/{DATA}/report")
    text = Elements(page).text
    assert "Check: fix first" in text and "half up to" in text
    for problem in checked["problems"]:
        assert visible(problem["message"]) in text and visible(problem["hint"]) in text
    assert re.search(r'data-go data-file="0" data-line="9">', page)
    assert '<option value="any">rows with problems</option>' in page
    for title in ("Length", "What is learned", "Turns", "Messages", "Sources", "Languages"):
        assert f'data-bars="{title}"' in page
    assert Elements(page).tags & {"script", "img", "iframe"} == set()


def test_bars_hold_every_value_of_the_check(checked: dict[str, Any]) -> None:
    charts = {chart["title"]: chart for chart in data_charts.of_check(checked)}
    length = charts["Length"]
    assert sum(bar["value"] for bar in length["bars"]) == checked["rows"]
    assert next(bar["name"] for bar in length["bars"] if bar["marked"]) == "1,025 to 2,048"
    learned = {bar["name"]: bar["value"] for bar in charts["What is learned"]["bars"]}
    assert sum(learned.values()) == checked["tokens"]["total"]
    many = checked | {"roles": {f"role {n}": 1 for n in range(50)}}
    bars = next(c for c in data_charts.of_check(many) if c["title"] == "Messages")["bars"]
    assert len(bars) == 31 and bars[-1] == {"name": "20 others", "value": 20, "marked": False}


def test_a_check_is_a_job_whose_result_is_kept(folder: Path, tmp_path: Path) -> None:
    jobs = Jobs(tmp_path / ".mule" / "jobs")
    kept = Kept(jobs, read_only=False)
    key = key_of(["data", "check"], [Path("chats.jsonl")])
    assert kept.look(key) == {"state": "none"}
    job = kept.start(key, "check", ["data", "check", "nowhere.jsonl", "--json"], "nowhere")
    while (found := kept.look(key))["state"] == "running":
        assert found["job"] == job.id
    for watcher in jobs._children:
        watcher.wait(60)
    assert found["state"] == "failed" and "nowhere.jsonl" in found["error"]
    os.utime("chats.jsonl", (1, 1))
    assert key_of(["data", "check"], [Path("chats.jsonl")]) != key  # asked again: it was touched
    write(str(tmp_path / ".mule" / "results" / f"{key}.json"), [{"job": "check-00000000"}])
    assert kept.look(key) == {"state": "none"}  # the job was removed before anybody looked


# ---------------------------------------------------------------- rows


def test_rows_are_shown_as_a_model_reads_them(checked: dict[str, Any], pages: RunningUi) -> None:
    page = shown(pages, f"/data/{DATA}/rows?start=0&n=3")
    assert page.count("<article") == 3 and "rows 1 to 3" in page and "throw-away" in page
    assert re.search(r'<mark class="learned"><span class="unheard">learned: </span>Go left', page)
    assert "(end of what is learned)" in page  # for who cannot see colours or lines
    assert '<span class="unheard">special token </span>&lt;|im_start|&gt;' in page
    assert "↵" in page
    later = shown(pages, f"/data/{DATA}/rows?start=38&n=10")
    assert later.count("<article") == 2 and re.search(r'data-start="48" disabled>Later', later)
    assert "There are no more rows" in shown(pages, f"/data/{DATA}/rows?start=40")


def test_hostile_rows_stay_text(checked: dict[str, Any], pages: RunningUi) -> None:
    page = shown(pages, f"/data/{DATA}/rows?start=3&n=7")
    found = Elements(page)
    assert found.tags & {"script", "img", "b", "iframe", "style", "a"} == set()
    assert not [name for name in found.attributes if name.startswith("on")]
    for text in ("<script>alert(1)</script>", "‹U+202E›", "␛[31m{{7*7}}", "&amp;"):
        assert text in found.text
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e\u2066-\u2069]", page)
    assert "210,031 characters: too many" in found.text and len(page) < 60_000
    assert "tokens are not shown" in found.text  # of the long answer both ends are
    assert "This cannot be read: broken JSON" in found.text and "<b>oops</b>" in found.text


def test_a_row_of_a_megabyte_is_shown_in_part(pages: RunningUi) -> None:
    own = id_of("runs/grey-mare")
    page = shown(pages, f"/data/{id_of('file/long.jsonl')}/rows?reader={own}")
    assert "1,050,031 characters: too many to show them as tokens here" in page
    assert len(page) < 6000 and "so so so" in page


def test_problems_are_linked_to_rows(checked: dict[str, Any], pages: RunningUi) -> None:
    page = shown(pages, f"/data/{DATA}/rows?problem=any&n=50")
    lines = {
        p["line"] for each in checked["problems"] for p in each["places"] if "train" in p["file"]
    }
    assert page.count("<article") == len(lines) and page.count('<ul class="marks">') == len(lines)
    codes = [problem["code"] for problem in checked["problems"]]
    same = shown(pages, f"/data/{DATA}/rows?problem={codes.index('duplicate')}")
    assert "row 21 · line 21" in same and "<code>duplicate</code>" in same
    none = shown(pages, f"/data/{DATA}/rows?problem={codes.index('duplicate')}&file=1")
    assert "No row of this file has this problem." in none
    jumped = shown(pages, f"/data/{DATA}/rows?line=21&n=2")
    assert "row 21 · line 21" in jumped and 'data-at="20"' in jumped


def test_a_run_is_read_with_its_own_tokenizer(pages: RunningUi) -> None:
    run = id_of("run/grey-mare")
    page = shown(pages, f"/data/{run}/rows")
    assert "the tokenizer of runs/grey-mare" in page and "A run was trained on this." in page
    chosen = shown(pages, f"/data/{TRAIN}/rows?n=1&reader={id_of('runs/grey-mare')}")
    assert "the tokenizer of runs/grey-mare" in chosen
    assert "What training reads is made" in shown(pages, f"/data/{run}/prepared")


def test_places_in_a_text_file_belong_to_the_document_around_them(
    tmp_path: Path,
) -> None:
    file = tmp_path / "text.txt"
    file.write_text("One.\nStill one.\n\n\nTwo.\n")
    reader = data_rows.RowReader(file, ReadOptions.make("text", {}, "main", "clean"))
    rows = reader.take(0, 10)
    assert reader.number_of(2) == 0 and reader.at_lines([2])[0].number == 0
    assert rows[-1].is_last and rows[-1].until is None


def test_going_on_reads_on_and_a_changed_file_begins_anew(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    write(str(file), [talk(f"Answer {n}") for n in range(20)])
    reader = data_rows.RowReader(file, ReadOptions())
    assert [row.number for row in reader.take(5, 3)] == [5, 6, 7]
    assert [row.number for row in reader.take(8, 2)] == [8, 9]
    assert [row.line for row in reader.take(2, 1)] == [3]
    assert reader.take(30, 5) == []
    write(str(file), [talk("other")] * 3)
    assert [row.number for row in reader.take(2, 5)] == [2]
    with pytest.raises(UserError, match="has no row at line 0"):
        reader.number_of(0)


def test_what_no_reader_sees_is_written_out() -> None:
    text = "a\u202eb\u061cc\u2066d\u200be\ufeff\ue000\U000e0041\ud800"
    assert visible(text) == ("a‹U+202E›b‹U+061C›c‹U+2066›d‹U+200B›e‹U+FEFF›\ue000‹U+E0041›‹U+D800›")
    assert visible("نمی\u200cخواهم 👩\u200d🔬\tb\n") == "نمی\u200cخواهم 👩\u200d🔬\tb\n"
