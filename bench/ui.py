"""The pages as they feel: chromium on `mule ui`, and the table of docs/ui.md.

    python -m bench.ui run        # half a minute; bench/results/ui.json and docs/ui.md
    python -m bench.ui report     # docs/ui.md from what was measured
    python -m bench.ui pictures   # docs/images

opening    first paint by the browser's own paint timing, until the list of runs stands there, and what
           was asked for, each round in a browser without a cache
run        a run of 100,000 updates: from the click until its curves are drawn; a part of them chosen
           with the mouse: the longest frame while one drags, and until the part is drawn
server     resident memory before the first page and after the last
"""

from __future__ import annotations

import json
import math
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from mule import fsio, machine
from mule.commands import docs, docs_ui
from mule.run import Run
from tests.browser.visitor import Served, Visit, launched, missing, serving, visiting

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page, Response

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results" / "ui.json"
IMAGES = ROOT / "docs" / "images"
POINTS, ROUNDS, LONG = 100_000, 5, "long"
_SMALL_RUNS = 20
_PAINT = """() => performance.getEntriesByName("first-contentful-paint")[0].startTime"""
_DRAWN = ".js-plotly-plot .main-svg .scatterlayer .trace path"
_WATCH_FRAMES = """() => {
  window.frames_ms = [];
  let last = performance.now();
  const step = (now) => {
    window.frames_ms.push(now - last);
    last = now;
    requestAnimationFrame(step);
  };
  requestAnimationFrame(step);
}"""
_RECIPE = "model: {size: 10m}\ndata: {train: [text.txt], format: text}\ntrain: {steps: 100000}\n"


def run() -> dict[str, Any]:
    """Every part, one after the other, against one server."""
    with tempfile.TemporaryDirectory(prefix="mule-ui-") as name, launched() as browser:
        folder = Path(name)
        write_long_run(folder, POINTS)
        with serving(folder) as served:
            process = psutil.Process(served.process.pid)
            before = process.memory_info().rss
            opening = [_opening(browser, served) for _ in range(ROUNDS)]
            curves = [_curves(browser, served) for _ in range(ROUNDS)]
            return {
                "bench": "ui",
                "command": "python -m bench.ui run",
                "date": time.strftime("%Y-%m-%d"),
                "machine": machine.describe(),
                "browser": f"Chromium {browser.version}",
                "rounds": ROUNDS,
                "points": POINTS,
                "opening": _medians(opening),
                "run": _medians(curves),
                "server": {
                    "memory_bytes_before": before,
                    "memory_bytes_after": process.memory_info().rss,
                },
            }


def write_long_run(folder: Path, num_steps: int) -> None:
    """A run of so many updates with a validation every hundred, and small ones beside it."""
    draw = random.Random(7)
    for name, count in ((LONG, num_steps), *((f"small-{i}", 50) for i in range(_SMALL_RUNS))):
        made = Run.create(folder / "runs", name, _RECIPE)
        lines, now = [], time.time() - count
        for step in range(1, count + 1):
            loss = 2 + 6 / (1 + step / 500) + draw.gauss(0, 0.05)
            row = {
                "step": step,
                "at": now + step,
                "attempt": 1,
                "loss": loss,
                "learning_rate": 1e-3 * (1 + math.cos(math.pi * step / count)) / 2,
                "grad_norm": abs(1 + draw.gauss(0, 0.2)),
                "tokens_per_second": 20_000 + draw.gauss(0, 300),
                "num_targets": 8192,
                "epoch": step / count,
            }
            lines.append(json.dumps(row | ({"val_loss": loss + 0.1} if step % 100 == 0 else {})))
        fsio.write_text(made.folder / "metrics.jsonl", "\n".join(lines) + "\n")
        with made.lock():
            made.start_attempt()
            made.log_event("finished", step=count)


# ---------------------------------------------------------------- what is measured


def _opening(browser: Browser, served: Served) -> dict[str, float]:
    started_at = time.perf_counter()
    with visiting(browser, served) as visit:
        visit.page.wait_for_selector("#main table")
        listed = time.perf_counter() - started_at
        answers = _answers(visit, lambda: visit.page.reload())
        return {
            "first_paint_ms": visit.page.evaluate(_PAINT),
            "listed_ms": 1000 * listed,
            "requests": len(answers),
            "bytes": sum(answers.values()),
            "other_places": len(visit.complaints),
        }


def _curves(browser: Browser, served: Served) -> dict[str, float]:
    with visiting(browser, served) as visit:
        page = visit.page
        page.wait_for_selector("#main table")
        started_at = time.perf_counter()

        def click() -> None:
            page.get_by_role("link", name=LONG, exact=True).click()
            page.wait_for_selector(_DRAWN, state="attached")

        answers = _answers(visit, click)
        drawn = time.perf_counter() - started_at
        page.wait_for_timeout(1500)
        longest, zoom = _zoom(page)
        scripts = sum(size for url, size in answers.items() if "/static/" in url)
        return {
            "curves_ms": 1000 * drawn,
            "bytes": sum(answers.values()) - scripts,
            "zoom_ms": 1000 * zoom,
            "longest_frame_ms": longest,
        }


def _zoom(page: Page) -> tuple[float, float]:
    """(longest frame of dragging, ms; seconds from letting go until other points are drawn)."""
    chart = page.locator(".js-plotly-plot .nsewdrag").first
    chart.scroll_into_view_if_needed()
    box = chart.bounding_box()
    assert box is not None
    path = page.locator(_DRAWN).first
    before, y = path.get_attribute("d"), box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + 0.3 * box["width"], y)
    page.mouse.down()
    page.evaluate(_WATCH_FRAMES)
    page.mouse.move(box["x"] + 0.5 * box["width"], y, steps=30)
    longest = page.evaluate("() => Math.max(...window.frames_ms.slice(1))")
    started_at = time.perf_counter()
    page.mouse.up()
    page.wait_for_function(
        f"(before) => document.querySelector({json.dumps(_DRAWN)})?.getAttribute('d') !== before",
        arg=before,
    )
    return longest, time.perf_counter() - started_at


def _answers(visit: Visit, work: Any) -> dict[str, int]:
    """Bytes of each answer that came while `work` was done, by its address."""
    sizes: dict[str, int] = {}

    def note(response: Response) -> None:
        if not response.url.endswith("/events"):
            sizes[response.url] = int(response.headers.get("content-length", 0))

    visit.page.on("response", note)
    work()
    visit.page.wait_for_timeout(300)
    visit.page.remove_listener("response", note)
    return sizes


def _medians(rounds: list[dict[str, float]]) -> dict[str, float]:
    return {name: round(statistics.median(r[name] for r in rounds), 1) for name in rounds[0]}


def main(verb: str) -> None:
    if verb != "report" and (lacks := missing()):
        raise SystemExit(lacks)
    if verb == "run":
        fsio.write_json(RESULTS, run())
    elif verb == "pictures":
        from bench.ui_pictures import take

        take(IMAGES)
        return
    page = docs_ui.PAGE
    fsio.write_text(docs.settings.DOCS / page, docs.generated_pages()[page])


if __name__ == "__main__":
    main(sys.argv[1] if sys.argv[1:] else "run")
