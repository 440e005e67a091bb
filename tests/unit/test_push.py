"""An export goes to the hub: checked, shown, in one commit, and nothing is replaced unseen."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mule import fsio
from mule.errors import UserError
from mule.export.about import About
from mule.export.record import add_files, new_record, read_sums, record_checks, write_record
from mule.hub.push import require_token
from mule.hub.repo import Repo
from tests.hub_server import HubServer

TOKEN = "hf_canary123"
# Each argument is one command, after settings of the environment; its JSON, or its error, is collected
# with what was shown.
_CHILD = """
import contextlib, io, json, os, sys
from mule.cli import main as cli
told, known = [], dict(os.environ)
for line in sys.argv[1:]:
    words = line.split()
    os.environ.update(known | dict(word.split("=") for word in words if "=" in word))
    sys.argv = ["mule", "push", *(word for word in words if "=" not in word), "--json"]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main()
        except SystemExit as end:
            code = end.code or 0
    shown = out.getvalue().splitlines()
    told.append([code, json.loads(shown[-1]) if shown else {}, err.getvalue()])
print(json.dumps(told))
"""


class Hub(HubServer):
    def push(self, *commands: str) -> list[list[Any]]:
        return self.run(_CHILD, commands, HF_TOKEN=TOKEN, HF_HUB_DISABLE_XET="1")

    def files(self, name: str) -> dict[str, bytes]:
        repo = self.repos["model", name]
        return repo.commits[repo.branches["main"]]


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    running = Hub(tmp_path / "home")
    running.home.mkdir()
    running.writers.add(TOKEN)
    yield running
    running.stop()


def write_export(folder: Path, *, verified: bool = True) -> Path:
    """An export folder of two files, as `mule export` and `mule verify` leave it."""
    folder.mkdir(parents=True)
    files = []
    for name in ("m-Q8_0.gguf", "m-Q4_K_M.gguf"):
        (folder / name).write_bytes(b"GGUF" + name.encode() * 99)
        sha256 = fsio.sha256_file(folder / name)
        files.append({"file": name, "type": name[2:-5], "size_bytes": 4, "sha256": sha256})
    (folder / "Modelfile").write_text("FROM ./m-Q8_0.gguf\n")
    known = About("m", [folder], {"run": "runs/m"}, is_base=False, is_new=True)
    record = new_record("gguf", folder, folder / "merged", known, "a" * 64)
    record |= {"command_name": "m"}
    add_files(folder, record, files)
    write_record(folder, record, ["Modelfile"])
    if verified:
        record_checks(folder, {file["file"]: {"ok": True, "verdict": "fine"} for file in files})
    return folder


def test_a_new_repository_gets_the_files_in_one_commit(hub: Hub) -> None:
    folder = write_export(hub.home / "exports" / "m")
    (folder / "notes.txt").write_text("mine")
    ((code, told, shown),) = hub.push("exports/m me/m --private --yes")
    assert (code, told["is_new"], told["private"]) == (0, True, True), told
    names = set(read_sums(folder)) | {"SHA256SUMS"}
    assert (
        {file["file"] for file in told["files"]}
        == names
        == {
            *("m-Q8_0.gguf", "m-Q4_K_M.gguf", "Modelfile", "README.md", "export.json", "SHA256SUMS")
        }
    )
    assert told["left_out"] == ["notes.txt"]
    there = hub.files("me/m")
    assert {name: there[name] for name in names} == {n: (folder / n).read_bytes() for n in names}
    assert hub.repos["model", "me/m"].private and len(hub.repos["model", "me/m"].commits) == 2
    assert told["commit"] == hub.repos["model", "me/m"].branches["main"]
    assert TOKEN not in shown + json.dumps(told)
    assert all(token in (TOKEN, "") for _, _, _, token in hub.asked)


def test_what_is_replaced_is_shown_before_it_is(hub: Hub) -> None:
    folder = write_export(hub.home / "m")
    theirs = {"other.txt": b"theirs", "Modelfile": b"FROM x\n"}
    hub.repo("me/old").push(theirs | {"SHA256SUMS": (folder / "SHA256SUMS").read_bytes()})
    asked, first, same, again, pushed, private = hub.push(
        *("m me/m", "m me/m --yes", "m me/m --yes"),
        *("m me/old", "m me/old --yes", "m me/old --yes --private"),
    )
    assert asked[0] == 2 and "nobody is here to be asked" in asked[1]["error"]
    assert "m-Q8_0.gguf" in asked[2] and "a new public repository" in asked[2]
    assert first[0] == 0 and {file["change"] for file in first[1]["files"]} == {"new"}
    assert same[0] == 0 and {file["change"] for file in same[1]["files"]} == {"same"}
    repo = hub.repos["model", "me/m"]
    assert len(repo.commits) == 2, "an upload without a change makes no commit"
    assert "which exists and is public" in again[2]
    changes = {file["file"]: file["change"] for file in pushed[1]["files"]}
    assert changes.pop("Modelfile") == "replaces" and changes.pop("SHA256SUMS") == "same"
    assert set(changes.values()) == {"new"}
    assert hub.files("me/old")["other.txt"] == b"theirs"
    assert hub.files("me/old")["Modelfile"] == (folder / "Modelfile").read_bytes()
    assert private[0] == 2 and "exists and is public" in private[1]["error"]


def test_a_card_may_be_edited_and_weights_not(hub: Hub) -> None:
    folder = write_export(hub.home / "m")
    with open(folder / "README.md", "a") as card:
        card.write("\nWhat I made it for.\n")
    record_checks(folder, {"m-Q8_0.gguf": {"ok": True, "verdict": "very fine"}})
    with open(folder / "README.md", "a") as card:
        card.write("More.\n")
    spoilt = shutil.copytree(folder, hub.home / "spoilt")
    with open(spoilt / "m-Q8_0.gguf", "ab") as weights:
        weights.write(b"x")
    edited, refused = hub.push("m me/m --yes", "spoilt me/m --yes")
    assert edited[0] == 0, edited
    assert hub.files("me/m")["README.md"].endswith(b"What I made it for.\nMore.\n")
    assert (
        refused[0] == 1
        and "is not what was exported: its SHA-256 is another" in refused[1]["error"]
    )


def test_what_was_not_verified_needs_a_word(hub: Hub) -> None:
    write_export(hub.home / "m", verified=False)
    bad = write_export(hub.home / "bad")
    record_checks(bad, {"m-Q8_0.gguf": {"ok": False, "verdict": "not the same model: tokens"}})
    (hub.home / "other").mkdir()
    plain, word, failed, other, name = hub.push(
        "m me/m --yes", "m me/m --yes --unverified", "bad me/m --yes", "other me/m", "m m --yes"
    )
    assert plain[0] == 2 and "m-Q8_0.gguf was not verified" in plain[1]["error"]
    assert plain[1]["hint"] == "mule verify m; or push it as it is: --unverified"
    assert word[0] == 0 and "m-Q8_0.gguf" in hub.files("me/m")
    assert failed[0] == 2 and "not the same model: tokens" in failed[1]["error"]
    assert other[0] == 2 and "is no export of Mule's" in other[1]["error"]
    assert name[0] == 2 and "is no name of a repository" in name[1]["error"]


def test_secrets_and_home_folders_are_not_passed_on(hub: Hub) -> None:
    words = {"a": (TOKEN, "your token"), "b": (f"{hub.home}/x", "the path of your home folder")}
    for name, (word, _) in words.items():
        with open(write_export(hub.home / name) / "README.md", "a") as card:
            card.write(f"see {word}\n")
    found = hub.push(*(f"HOME={hub.home} {name} me/m --yes" for name in words))
    for (code, told, shown), (word, what) in zip(found, words.values()):
        assert code == 2 and f"README.md holds {what}" in told["error"], told
        assert word not in shown
    assert not hub.repos


def test_errors_of_the_hub_are_said_for_somebody_who_uploads(hub: Hub) -> None:
    write_export(hub.home / "m")
    hub.repo("me/busy").push({"a": b"b"})
    hub.repo("me/away").push({"a": b"b"})
    hub.failing = {"busy/commit/": (412, {}), "away/commit/": (503, {})}
    found = hub.push(
        *("HF_TOKEN= m me/m --yes", "HF_TOKEN=hf_other m me/m --yes"),
        *("m me/busy --yes", "m me/away --yes"),
    )
    errors = (
        "uploading needs a token that may write",
        "your token may not write there (403)",
        "changed by somebody else in the meantime",
        "the hub cannot be reached, or is overloaded",
    )
    for (code, told, _), error in zip(found, errors, strict=True):
        assert code == 2 and error in told["error"], told
    assert set(hub.files("me/busy")) == {"a"}, "nothing is seen before the commit"


def test_nothing_is_uploaded_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="nothing can be uploaded while HF_HUB_OFFLINE is set"):
        require_token(Repo("model", "me/m"))
