"""The road from a fresh clone to `.venv/bin/mule`: Makefile, tools/*.sh, constraints.txt."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
TARGETS = ["help", "setup", "demo", "test", "test-all", "check", "bench", "bench-plan"]
TARGETS += ["docs", "site", "clean"]
SYSTEM = "/usr/bin:/bin"


def run(*command: str, cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess[str]:
    env = {"PATH": SYSTEM, **env}
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=60)


def executable(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def fake_python(path: Path, version: str, prelude: str = "pass") -> Path:
    """A program that answers `-c CODE` as a Python of `version` at `path` would."""
    numbers = tuple(int(part) for part in version.split("."))
    disguise = f"import sys; sys.version_info = {numbers}; sys._base_executable = '{path}'; "
    command = f"""'{sys.executable}' -c "{disguise}{prelude}; exec(sys.argv[2])" "$@\""""
    return executable(path, f"#!/bin/sh\nexec {command}\n")


# ---------------------------------------------------------------- Makefile


def test_help_is_the_default_and_lists_every_target() -> None:
    shown = run("make").stdout
    assert shown == run("make", "help").stdout
    listed = dict(re.findall(r"^  ([a-z-]+) +(\S.+)$", shown, re.MULTILINE))
    assert list(listed) == TARGETS
    phony = re.search(r"^\.PHONY: (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert phony is not None and phony[1].split() == TARGETS


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("setup", "sh tools/setup.sh"),
        ("demo", ".venv/bin/mule demo"),
        ("test", '-n 2 --dist worksteal -m "not slow"'),
        ("test-all", '-n 2 --dist worksteal -m "slow or not slow"'),
        ("check", "pyrefly check"),
        ("bench", ".venv/bin/mule bench all"),
        ("docs", "-m mule.commands.docs"),
        ("site", ".venv/bin/zensical build --strict"),
        ("clean", "rm -rf .venv"),
    ],
)
def test_a_target_runs_its_command_after_the_setup(target: str, expected: str) -> None:
    commands = run("make", "-n", target)
    assert commands.returncode == 0, commands.stderr
    assert expected in commands.stdout
    assert ("sh tools/setup.sh" in commands.stdout) == (target != "clean")


def test_the_makefile_uses_nothing_newer_than_make_3_81() -> None:
    text = (ROOT / "Makefile").read_text()
    newer = [".ONESHELL", "!=", "$(file ", "&:", "::=", ".SHELLFLAGS", "$(let ", "$(intcmp "]
    assert [word for word in newer if word in text] == []


def test_clean_removes_the_environment_and_caches_and_nothing_else(tmp_path: Path) -> None:
    shutil.copy(ROOT / "Makefile", tmp_path)
    gone = [".venv/bin/mule", ".ruff_cache/x", ".hypothesis/x", "mule/data/__pycache__/a.pyc"]
    kept = ["mule/data/a.py", "recipes/a.yaml", "runs/a/latest.json", "runs/__pycache__/a"]
    kept += ["data/train.jsonl", "data/__pycache__/a", "demo/story.gguf", "exports/a.gguf"]
    for name in gone + kept:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    result = run("make", "clean", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert [name for name in gone if (tmp_path / name).exists()] == []
    assert [name for name in kept if not (tmp_path / name).exists()] == []
    assert not (tmp_path / "mule/data/__pycache__").exists()


# ---------------------------------------------------------------- finding a Python


def find(folder: Path, **env: str) -> subprocess.CompletedProcess[str]:
    return run("/bin/sh", str(ROOT / "tools/find_python.sh"), PATH=str(folder), **env)


def test_a_newer_python_is_found_beside_an_older_default(tmp_path: Path) -> None:
    fake_python(tmp_path / "python3", "3.9.6")
    fake_python(tmp_path / "python3.11", "3.11.7")
    newest = fake_python(tmp_path / "python3.12", "3.12.1")
    assert find(tmp_path).stdout == f"{newest}\n"


def test_a_shim_that_fails_is_skipped(tmp_path: Path) -> None:
    executable(tmp_path / "python3.13", "#!/bin/sh\necho 'command not found' >&2\nexit 127\n")
    default = fake_python(tmp_path / "python3", "3.14.2")
    assert find(tmp_path).stdout == f"{default}\n"


def test_python_named_by_the_user_wins_and_is_checked(tmp_path: Path) -> None:
    fake_python(tmp_path / "python3.13", "3.13.0")
    named = fake_python(tmp_path / "mine", "3.11.2")
    assert find(tmp_path, PYTHON="mine").stdout == f"{named}\n"
    fake_python(tmp_path / "mine", "3.10.4")
    refused = find(tmp_path, PYTHON="mine")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "PYTHON=mine cannot be used: mine is 3.10.4; Mule needs Python 3.11" in refused.stderr
    missing = find(tmp_path, PYTHON="nowhere")
    assert "PYTHON=nowhere cannot be used: it does not run" in missing.stderr
    assert "hint: name another, as in: make setup PYTHON=python3.12" in missing.stderr


def test_without_a_fitting_python_the_error_says_what_was_found(tmp_path: Path) -> None:
    assert "no Python 3.11 or newer on PATH (none runs)" in find(tmp_path).stderr
    fake_python(tmp_path / "python3", "3.9.6")
    fake_python(tmp_path / "python", "2.7.18")
    refused = find(tmp_path)
    assert refused.returncode == 2
    assert "(python3 is 3.9.6, python is 2.7.18)" in refused.stderr
    assert "make setup PYTHON=/path/to/python3.13" in refused.stderr


@pytest.mark.skipif(sys.prefix == sys.base_prefix, reason="needs a virtual environment")
def test_an_activated_environment_is_not_built_from_itself() -> None:
    found = find(Path(sys.prefix) / "bin").stdout.strip()
    assert Path(found).is_file() and not found.startswith(sys.prefix)


# ---------------------------------------------------------------- setup.sh, with a fake pip

VENV_PYTHON = """#!/bin/sh
# Stands for .venv/bin/python: notes what pip is asked to install.
case "$1 $2" in
"-m pip")
    echo "$*" >> pip.txt
    case "$*" in *"-e .[dev]"*)
        test -f break.txt && { cat break.txt; exit 1; }
        printf '#!/bin/sh\\necho usage\\n' > .venv/bin/mule && chmod +x .venv/bin/mule ;;
    esac ;;
-V*) echo Python 3.12.1 ;;
*) exec 'PYTHON' "$@" ;;
esac
"""


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A fresh clone, with a Python 3.12 on PATH whose `-m venv` makes a fake environment."""
    folder = tmp_path / "a clone"
    folder.mkdir()
    shutil.copytree(ROOT / "tools", folder / "tools")
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, folder)
    template = executable(tmp_path / "template", VENV_PYTHON.replace("PYTHON", sys.executable))
    base = fake_python(tmp_path / "bin/python3.12", "3.12.1")
    make_venv = f'test "$2" = venv && mkdir -p .venv/bin && cp "{template}" .venv/bin/python\n'
    lines = f"case $1 in -V) echo Python 3.12.1; exit;; -m) {make_venv} exit;; esac\n"
    executable(base, base.read_text().replace("#!/bin/sh\n", f"#!/bin/sh\n{lines}"))
    return folder


def setup(clone: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run("make", "setup", *arguments, cwd=clone, PATH=f"{clone.parent / 'bin'}:{SYSTEM}")


def test_setup_installs_the_pins_and_says_what_it_does(clone: Path) -> None:
    done = setup(clone)
    assert done.returncode == 0, done.stderr
    for line in (
        "Setting up Mule in .venv (Python 3.12.1",
        "1/4  environment",
        "2/4  PyTorch 2.13.0",
        "3/4  Mule and its libraries",
        "4/4  first start",
    ):
        assert line in done.stdout
    assert re.search(r"^installed in \d+ s, \d+\.\d GB, of which torch ", done.stdout, re.MULTILINE)
    torch, mule = (clone / "pip.txt").read_text().splitlines()
    assert "-c constraints.txt torch hatchling editables" in torch
    assert "-c constraints.txt --no-build-isolation -e .[dev]" in mule


def test_a_second_setup_does_nothing_until_a_pin_changes(clone: Path) -> None:
    setup(clone)
    assert setup(clone).stdout == "up to date: .venv (Python 3.12.1)\n"
    assert len((clone / "pip.txt").read_text().splitlines()) == 2
    with (clone / "constraints.txt").open("a") as file:
        file.write("# changed\n")
    assert "Bringing .venv up to date" in setup(clone).stdout
    assert len((clone / "pip.txt").read_text().splitlines()) == 4


def test_a_failed_installation_shows_the_log_and_starts_afresh(clone: Path) -> None:
    pip_said = [f"line {number:02}" for number in range(30)]
    (clone / "break.txt").write_text("\n".join(pip_said) + "\n")
    failed = setup(clone)
    assert failed.returncode != 0
    assert "3/4  Mule and its libraries   failed" in failed.stdout
    assert failed.stderr.startswith("\n".join(pip_said[-20:]) + "\n")
    assert "error: the installation stopped (above: the end of .venv/setup.log)" in failed.stderr
    assert "line 00" in (clone / ".venv/setup.log").read_text()
    (clone / "break.txt").unlink()
    again = setup(clone)
    assert again.returncode == 0
    assert "The .venv here is incomplete, moved or of another Python: making it again" in (
        again.stdout
    )


@pytest.mark.parametrize(
    ("pip_said", "error", "hint"),
    [
        ("OSError: [Errno 28] No space left on device", "the disk filled up", "set TMPDIR"),
        ("NewConnectionError: failed", "index could not be reached", "check the network"),
        ("ERROR: No matching distribution found for torch", "no build for this machine", "64-bit"),
    ],
)
def test_a_known_failure_is_explained(clone: Path, pip_said: str, error: str, hint: str) -> None:
    (clone / "break.txt").write_text(pip_said + "\n")
    message = setup(clone).stderr
    assert re.search(rf"^error: .*{error}", message, re.MULTILINE)
    assert re.search(rf"^hint: .*{hint}", message, re.MULTILINE)


def test_a_moved_environment_is_made_again(clone: Path) -> None:
    setup(clone)
    moved = clone.rename(clone.with_name("moved"))
    assert "making it again" in setup(moved).stdout
    assert setup(moved).stdout.startswith("up to date")


def test_too_little_disk_is_refused_before_anything_is_written(clone: Path) -> None:
    header = "Filesystem 1024-blocks Used Available Capacity Mounted on"
    row = "map auto_home 9000000 6902848 2097152 77% /a disk"
    executable(clone.parent / "bin/df", f"#!/bin/sh\necho '{header}'\necho '{row}'\n")
    refused = setup(clone)
    assert refused.returncode != 0
    assert f"needs 3.0 GiB in {clone}, which has 2.0 GiB free" in refused.stderr
    assert "hint: free some space" in refused.stderr
    assert not (clone / ".venv").exists()


def test_a_python_without_venv_names_the_debian_package(clone: Path) -> None:
    fake_python(clone.parent / "bin/python3.12", "3.12.1", "sys.modules['ensurepip'] = None")
    refused = setup(clone)
    assert "python3.12 has no venv module" in refused.stderr
    assert "hint: sudo apt install python3-venv, or python3.12-venv" in refused.stderr
    assert not (clone / ".venv").exists()


# ---------------------------------------------------------------- constraints.txt


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in pairs}


def test_every_dependency_is_pinned_within_its_range() -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        declared = tomllib.load(file)
    extras = declared["project"]["optional-dependencies"].values()
    wanted = [declared["build-system"]["requires"], declared["project"]["dependencies"], *extras]
    for requirement in (Requirement(text) for group in wanted for text in group):
        version = pins().get(canonicalize_name(requirement.name))
        assert version is not None, f"{requirement.name} is not in constraints.txt"
        assert requirement.specifier.contains(version), f"{requirement} excludes {version}"


def test_torch_is_pinned_without_a_local_tag() -> None:
    assert pins()["torch"] == "2.13.0"
    assert [name for name, version in pins().items() if "+" in version] == []


def test_ci_runs_the_same_targets_without_input() -> None:
    script = ROOT / ".ci/run"
    assert script.stat().st_mode & 0o111
    text = script.read_text()
    assert "set -euo pipefail" in text and "exec </dev/null" in text
    assert re.findall(r"^make (\S+)$", text, re.MULTILINE) == ["check", "test"]
