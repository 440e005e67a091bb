"""The pages in this process, behind the guard, over a folder that a test makes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mule import fsio
from mule.run import Run
from mule.serve.server import Server
from mule.web.app import Ui
from mule.web.site import Site
from tests.serve_case import HOSTS, TOKEN, listening
from tests.serve_sweep import send

RUN = "grey-mare"


@dataclass
class RunningUi:
    """The pages on a port."""

    ui: Ui
    server: Server
    port: int

    def ask(
        self, path: str, body: object = None, *, token: str | None = TOKEN
    ) -> tuple[int, dict[str, str], bytes]:
        """(status, headers, body) of the answer; `body` is posted as JSON."""
        lines = [f"{'GET' if body is None else 'POST'} {path} HTTP/1.1", "connection: close"]
        lines.append(f"host: 127.0.0.1:{self.port}")
        if token is not None:
            lines.append(f"authorization: Bearer {token}")
        content = b"" if body is None else json.dumps(body).encode()
        if body is not None:
            lines += ["content-type: application/json", f"content-length: {len(content)}"]
        return send(self.port, "\r\n".join([*lines, "", ""]).encode() + content)


@contextmanager
def ui_running(site: Site) -> Iterator[RunningUi]:
    """The pages of `site`."""
    ui = Ui(site, token=TOKEN, hosts=HOSTS)
    with listening(ui) as (server, port), site.at_close:
        yield RunningUi(ui, server, port)


def write_run(root: Path, name: str = RUN, num_steps: int = 40) -> Run:
    """A run folder as training leaves it, without weights."""
    recipe = "model: {size: 1m}\ndata: {train: [text.txt], format: text}\ntrain: {steps: 40}\n"
    recipe += "optim: {learning_rate: 0.001}\n"
    run = Run.create(root, name, recipe)
    with run.lock():
        run.start_attempt()
        for step in range(1, num_steps + 1):
            row = {"step": step, "loss": 5 - step / 20, "learning_rate": 1e-3, "grad_norm": 1.0}
            if step % 10 == 0:
                row["val_loss"] = 5.1 - step / 20
            run.log_metrics({**row, "tokens_per_second": 900.0, "epoch": step / 40})
        run.log_samples(num_steps, {"the cat": "<script>alert(1)</script> sat"})
        run.log_event("finished", step=num_steps)
    fsio.write_text(run.folder / "resolved.yaml", recipe)
    return run
