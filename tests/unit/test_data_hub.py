"""Hub datasets, fetched by the real library from a small server on this machine."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from mule.data.sources.hub import HubAddress
from mule.errors import UserError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "README.md": b"read me",
    "main/train-00000-of-00001.jsonl": b'{"text": "a"}\n' * 10,
    "main/test-00000-of-00001.jsonl": b'{"text": "c"}\n',
    "extra/more.csv": b"text\nb\n",
    "weights.bin": b"123",
}
_CHILD = """
import json, sys
from mule import progress
from mule.data.sources.paths import expand
from mule.errors import MuleError
notes = []
class Sink(progress.Silence):
    def note(self, text, level): notes.append(text)
    def advance(self, key, amount, fields): told.append(amount)
told, found = [], []
with progress.using(Sink()):
    for address in sys.argv[1:]:
        try:
            found.append([str(file) for file in expand([address])])
        except MuleError as error:
            found.append([type(error).__name__, str(error), error.exit_code])
print(json.dumps({"found": found, "notes": notes, "bytes": sum(told)}))
"""


class _Hub(BaseHTTPRequestHandler):
    """The few addresses of the hub that a snapshot of a dataset needs."""

    asked: list[str]
    size_bytes = 0  # claimed for the training file, where not 0

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.asked.append(f"{self.command} {path}")
        api, files = "/api/datasets/org/data", f"/datasets/org/data/resolve/{COMMIT}/"
        if path.startswith("/api/datasets/org/gated"):
            self._answer(403, b"{}", {"X-Error-Code": "GatedRepo"})
        elif path == f"{api}/revision/nope":
            self._answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        elif path.startswith(f"{api}/tree/"):
            tree = [
                {"type": "file", "path": name, "size": len(body), "oid": _oid(body)}
                for name, body in FILES.items()
            ]
            self._answer(200, json.dumps(tree).encode())
        elif path.startswith(f"{api}/revision/"):
            siblings = [
                {"rfilename": name, "size": self.size_bytes or len(body)}
                for name, body in FILES.items()
            ]
            info = {"id": "org/data", "sha": COMMIT, "siblings": siblings}
            self._answer(200, json.dumps(info).encode())
        elif path.startswith(files):
            body = FILES[path.removeprefix(files)]
            self._answer(200, body, {"ETag": f'"{_oid(body)}"', "X-Repo-Commit": COMMIT})
        else:
            self._answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET

    def _answer(self, code: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _oid(body: bytes) -> str:
    return hashlib.sha1(body).hexdigest()


class Hub:
    """A running server and a cache of its own."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.handler = type("Handler", (_Hub,), {"asked": []})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self.handler)
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def expand(self, *addresses: str, **environment: str) -> dict:
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
        address = f"http://127.0.0.1:{self.server.server_port}"
        done = subprocess.run(
            [sys.executable, "-c", _CHILD, *addresses],
            env={**inherited, "HF_ENDPOINT": address, "HF_HOME": str(self.home), **environment},
            cwd=self.home,
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
        assert done.stderr == ""  # the library shows no bars and warnings of its own
        return json.loads(done.stdout)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    running = Hub(tmp_path)
    yield running
    running.stop()


def test_fetched_pinned_cached_and_offline(hub: Hub) -> None:
    first = hub.expand("org/data", "org/data")
    (train,), again = first["found"]
    assert train.endswith(f"snapshots/{COMMIT}/main/train-00000-of-00001.jsonl")
    assert Path(train).read_bytes() == FILES["main/train-00000-of-00001.jsonl"]
    assert again == [train]
    assert first["bytes"] == sum(len(FILES[name]) for name in FILES if name[0] in "me")
    assert first["notes"] == [  # once
        f"org/data is at commit {COMMIT}; to use exactly this one again, write "
        f"hf://datasets/org/data@{COMMIT}"
    ]
    assert not [name for name in hub.handler.asked if "weights" in name or "README" in name]

    hub.handler.asked.clear()
    pinned = hub.expand(f"org/data@{COMMIT}", f"hf://datasets/org/data@{COMMIT}/extra/more.csv")
    assert [Path(file).name for (file,) in pinned["found"]] == [Path(train).name, "more.csv"]
    assert pinned["notes"] == []
    assert not [line for line in hub.handler.asked if "datasets" in line]  # all from the cache

    hub.stop()
    assert hub.expand("org/data")["found"] == [[train]]
    offline = hub.expand("org/data", "org/data@v2", HF_HUB_OFFLINE="1")
    assert offline["found"][0] == [train]
    kind, text, code = offline["found"][1]
    assert (kind, code) == ("UserError", 2)
    assert text.startswith("org/data@v2: neither a file or folder here nor in the hub cache, and ")
    assert "hint: fetch it once with network (unset HF_HUB_OFFLINE)" in text


def test_what_cannot_be_fetched(hub: Hub) -> None:
    addresses = ["org/nothing", "org/gated", "org/data@nope", "hf://datasets/org/data/none"]
    errors = hub.expand(*addresses)["found"]
    assert all(error[0] == "UserError" and error[2] == 2 for error in errors)
    nothing, gated, revision, inside = (error[1] for error in errors)
    assert nothing.startswith("org/nothing: neither a file or folder here nor a dataset on the hub")
    assert nothing.endswith("hint: check the name; for a private dataset set HF_TOKEN")
    assert "its owner asks you to accept terms first\nhint: accept them at https://" in gated
    assert "then set HF_TOKEN" in gated
    assert "the dataset has no revision 'nope'" in revision
    assert "datasets/org/data/commits/main" in revision
    assert f"no data file there at commit {COMMIT[:12]}\nhint: look at https://" in inside
    hub.stop()
    ((_, away, _),) = hub.expand("org/data")["found"]
    assert "the hub cannot be reached, and its cache does not hold this dataset" in away
    assert "hint: check the network, or give a local file" in away


def test_a_dataset_larger_than_the_disk(hub: Hub) -> None:
    hub.handler.size_bytes = 10**18
    ((kind, text, _),) = hub.expand("org/data")["found"]
    assert kind == "StorageError"
    assert text.startswith("org/data (all its data files) needs ")
    assert not [line for line in hub.handler.asked if "resolve" in line]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("org/data", HubAddress("org/data", "", "")),
        ("org/data@v1.0", HubAddress("org/data", "v1.0", "")),
        ("hf://datasets/org/data/", HubAddress("org/data", "", "")),
        ("hf:/datasets/org/da.ta@v1/a/b.csv", HubAddress("org/da.ta", "v1", "a/b.csv")),
        (
            "hf://datasets/org/data@refs/convert/parquet/main",
            HubAddress("org/data", "refs/convert/parquet", "main"),
        ),
    ],
)
def test_addresses(text: str, expected: HubAddress) -> None:
    assert HubAddress.parse(text) == expected


@pytest.mark.parametrize("text", ["hf://org", "hf://datasets/data", "hf://datasets/a/b/../../c"])
def test_wrong_addresses(text: str) -> None:
    with pytest.raises(UserError, match="not the address of a hub dataset") as caught:
        HubAddress.parse(text)
    assert "write hf://datasets/ORG/NAME" in caught.value.hint
