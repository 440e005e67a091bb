"""The command line as a user meets it: start-up, exit codes, errors, JSON."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import mule
from mule.cli.perform import split_words
from mule.errors import CheckFailed, DataError, Interrupted, UserError
from tests.conftest import Mule
from tests.unit.test_cli_tables import FILE

HEAVY = ("torch", "transformers", "pydantic", "numpy", "pyarrow", "rich", "ruamel.yaml")


@pytest.mark.parametrize("words", [(), ("data",), ("data", "preview")])
def test_help_loads_nothing_heavy_and_little_at_all(words: tuple[str, ...]) -> None:
    heavy = HEAVY if not words else [name for name in HEAVY if name != "pydantic"]  # typer's own
    code = (
        f"import sys; sys.argv = ['mule', *{words!r}, '--help']\n"
        "from mule.cli.main import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        f"found = [name for name in {heavy} if name in sys.modules]\n"
        "print(found, '|', len(sys.modules), file=sys.stderr)\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    heavy_found, num_modules = ran.stderr.split(" | ")
    assert heavy_found == "[]"
    assert int(num_modules) < 350  # what takes the time; seconds would measure the machine
    assert f"Usage: {' '.join(['mule', *words])} [OPTIONS]" in ran.stdout


def test_every_verb_is_there(mule_cli: Mule) -> None:
    code, out, _ = mule_cli("--help")
    assert code == 0
    for verb in (
        *(
            "demo",
            "init",
            "data",
            "train",
            "runs",
            "merge",
            "convert",
            "export",
            "verify",
            "eval",
            "chat",
        ),
        *("bench", "recipe"),
    ):
        assert f"\n  {verb} " in out, verb


def test_version(mule_cli: Mule) -> None:
    assert mule_cli("--version") == (0, f"mule {mule.__version__}\n", "")


@pytest.mark.parametrize("words", [("trian",), ("train", "--resum"), ("runs", "show")])
def test_wrong_usage_exits_with_2(mule_cli: Mule, words: tuple[str, ...]) -> None:
    code, out, err = mule_cli(*words)
    assert code == 2
    assert out == ""
    assert "Error: " in err


def test_a_user_error_is_two_lines_and_no_traceback(mule_cli: Mule) -> None:
    code, out, err = mule_cli("runs", "show", "pizza")
    assert code == 2
    assert out == ""
    assert err == (
        "error: no run called `pizza` in runs\n"
        "hint: there is none in runs yet; `mule train RECIPE` makes one\n"
    )


def test_long_errors_are_not_wrapped(mule_cli: Mule, fake: Any) -> None:
    def refuse(*_args: Any, **_options: Any) -> None:
        raise DataError("a/long/folder/" * 20 + "x.jsonl", 12, "not JSON [bold]", "fix it")

    fake("train", "run", refuse)
    _, _, err = mule_cli("train", "x.yaml")
    assert err == f"error: {'a/long/folder/' * 20}x.jsonl:12: not JSON [bold]\nhint: fix it\n"


@pytest.mark.parametrize(
    ("error", "exit_code"),
    [
        (UserError("no", "do this"), 2),
        (CheckFailed("differs"), 1),
        (Interrupted(15, "saved"), 143),
        (KeyboardInterrupt(), 130),
        (RuntimeError("a defect"), 1),
    ],
)
def test_exit_codes(mule_cli: Mule, fake: Any, error: BaseException, exit_code: int) -> None:
    def fail(*_args: Any, **_options: Any) -> None:
        raise error

    fake("train", "run", fail)
    code, out, err = mule_cli("train", "x.yaml", "--json")
    assert code == exit_code
    said = json.loads(out.splitlines()[-1])
    assert said["ok"] is False
    assert said["exit_code"] == exit_code
    assert err.startswith(f"error: {said['error']}")
    assert "Traceback" not in err


def test_debug_shows_the_traceback(mule_cli: Mule, fake: Any) -> None:
    def fail(*_args: Any, **_options: Any) -> None:
        raise RuntimeError("a defect")

    fake("train", "run", fail)
    for words in (("--debug", "train", "x"), ("train", "x", "--debug")):
        code, _, err = mule_cli(*words)
        assert code == 1
        assert "Traceback" in err
        assert "this is a defect of Mule" in err


def test_json_is_the_last_line_and_people_read_stderr(mule_cli: Mule, fake: Any) -> None:
    result = {"ok": True, "run": Path("runs/a"), "loss": float("nan"), "next": "mule chat a"}
    fake("train", "run", lambda *_args, **_options: result)
    code, out, err = mule_cli("train", "x.yaml", "--json")
    assert code == 0
    assert json.loads(out) == {"ok": True, "run": "runs/a", "loss": None, "next": "mule chat a"}
    assert "next: mule chat a" in err
    code, out, err = mule_cli("train", "x.yaml")
    assert out.endswith("next: mule chat a\n")
    assert err == ""


def test_train_takes_recipe_overrides_and_options_in_any_order(mule_cli: Mule, fake: Any) -> None:
    calls = []
    fake("train", "run", lambda *args, **options: calls.append((args, options)) or {})
    mule_cli("train", "r.yaml", "train.steps=5", "--resume", "optim.beta1=0.8", "--name", "n")
    mule_cli("train", "model.size=1m")
    assert calls == [
        (
            (Path("r.yaml"), ["train.steps=5", "optim.beta1=0.8"]),
            {"resume": True, "name": "n", "assume": False},
        ),
        ((None, ["model.size=1m"]), {"resume": False, "name": None, "assume": False}),
    ]


def test_a_file_with_an_equals_sign_is_a_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lr=1.yaml").touch()
    assert split_words(["lr=1.yaml", "a=b"]) == (Path("lr=1.yaml"), ["a=b"])
    assert split_words(["lr=2.yaml", "a=b"]) == (None, ["lr=2.yaml", "a=b"])
    assert split_words([]) == (None, [])


def test_a_failed_check_shows_its_table_and_exits_with_1(mule_cli: Mule, fake: Any) -> None:
    files = [FILE | {"file": "m-Q4.gguf", "kl_mean": 0.25, "ok": False}]
    result = {"ok": False, "against": "m", "files": files}
    fake("verify", "run", lambda *_args, **_options: result)
    code, out, _ = mule_cli("verify", "m-Q4.gguf")
    assert code == 1
    assert "m-Q4.gguf" in out and "2.5e-01" in out and "FAILED" in out


def test_verify_asks_as_many_prompts_as_told(mule_cli: Mule, fake: Any) -> None:
    asked = []
    result = {"ok": True, "against": "m", "files": [FILE]}
    fake("verify", "run", lambda *_args, **options: asked.append(options["prompts"]) or result)
    mule_cli("verify", "m.gguf", "--prompts", "7")
    mule_cli("verify", "m.gguf")
    assert asked == [7, 50]
    assert mule_cli("verify", "m.gguf", "--prompts", "-1")[0] == 2


def test_export_types_are_a_list_of_lower_case_words(mule_cli: Mule, fake: Any) -> None:
    calls = []
    result = {"folder": "exports/m", "files": [], "ollama": [], "docker": [], "notes": []}
    fake("export", "run_as", lambda *words: calls.append(words) or result)
    mule_cli("export", "m", "--types", "F16, q8_0")
    mule_cli("export", "m", "--adapter-only")
    assert [(form, source, given["types"]) for form, source, given in calls] == [
        ("--types", "m", ["f16", "q8_0"]),
        ("--adapter-only", "m", None),
    ]
    code, out, _ = mule_cli("export", "m", "--hf", "--adapter-only", "--json")
    assert code == 2 and "write different things" in json.loads(out.splitlines()[-1])["error"]


def test_runs_list_and_show_in_the_terminal(mule_cli: Mule, tmp_path: Path) -> None:
    from mule.run import Run

    run = Run.create(tmp_path / "runs", "pizza", "x: 1\n")
    with run.lock():
        run.start_attempt()
        run.log_metrics({"step": 7, "loss": 1.25, "share_of_peak": 0.305})
        run.log_event("finished")
    code, out, _ = mule_cli("runs", "list")
    assert code == 0
    assert "pizza" in out and "finished" in out and "1.25" in out
    code, out, _ = mule_cli("runs", "show", "pizza", "--json")
    assert json.loads(out.splitlines()[-1])["steps"] == 7


def test_recipe_show_names_the_nearest(mule_cli: Mule, monkeypatch: pytest.MonkeyPatch) -> None:
    from mule.config import presets

    folder = Path("own").absolute()
    folder.mkdir()
    (folder / "first.yaml").write_text("# The first\nmodel: {size: 1m}  # [small]\n")
    monkeypatch.setattr(presets, "_FOLDERS", (folder,))
    code, out, _ = mule_cli("recipe", "show", "first")
    assert out.startswith("# The first\nmodel: {size: 1m}  # [small]\n")
    code, out, _ = mule_cli("recipe", "list", "--json")
    assert json.loads(out.splitlines()[-1])["recipes"][0]["about"] == "The first"
    code, _, err = mule_cli("recipe", "show", "frist")
    assert code == 2
    assert "hint: did you mean `first`?" in err
