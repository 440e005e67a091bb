"""`mule doctor --env`: what it says of a machine, and of what is missing for what."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import time
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from mule import calibration, machine
from mule.commands import doctor_env, env_packages
from mule.commands.doctor_env import EXTRAS
from mule.commands.env_packages import Package

ROOT = Path(__file__).resolve().parents[2]
TOKEN = "hf_" + "x" * 30
H100 = ["NVIDIA H100", 80 * 2**30, [9, 0]]


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """A machine without programs, GPU, token or cache."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", *doctor_env._SETTINGS):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(shutil, "which", lambda program: None)
    monkeypatch.setattr(doctor_env, "_sees_gpu", lambda: False)
    monkeypatch.setattr(machine, "cpp_compiler_problem", lambda: None)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "login"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.chdir(tmp_path)
    return monkeypatch


def _capability(name: str) -> dict[str, Any]:
    (found,) = (c for c in doctor_env.run()["capabilities"] if name in c["name"])
    return found


def _versions(monkeypatch: pytest.MonkeyPatch, **changed: str | None) -> None:
    """Other versions of some packages than those installed; None for missing."""
    plain = metadata.version

    def version(name: str) -> str:
        found = changed.get(name.replace("-", "_"), plain(name) if name not in changed else None)
        if found is None:
            raise metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(metadata, "version", version)


# ---------------------------------------------------------------- the command


def test_it_is_quick_and_imports_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from mule.commands import doctor_env; doctor_env.run(); "
        "assert 'torch' not in sys.modules"
    )
    began = time.perf_counter()
    ran = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert time.perf_counter() - began < 10  # about one on an idle machine


def test_the_screen(mule_cli: Any, bare: pytest.MonkeyPatch) -> None:
    bare.setenv("HF_HOME", "/somewhere")
    code, text, _ = mule_cli("doctor", "--env")
    assert code == 0
    for said in (
        f"processor  {machine.cpu_model()}, {machine.physical_cores()} cores",
        "devices    the processor alone",
        f"python     {platform.python_version()}, {sys.executable}",
        f"torch      {metadata.version('torch')}",
        "every run needs are as pyproject asks",
        "measured   nothing yet; `mule plan RECIPE` measures this machine",
        "set        HF_HOME=/somewhere",
        "Where things are kept",
        "measurements of this machine",
        "What works here, and what is missing for what",
        "ready     compiled training (torch.compile): the C++ compiler works",
        "not here  training on a GPU: no GPU; the processor computes",
        "mule plan RECIPE --machine rtx4090",
        "next: mule demo",
    ):
        assert said in text, said


def test_as_json(mule_cli: Any, bare: pytest.MonkeyPatch) -> None:
    code, text, _ = mule_cli("doctor", "--env", "--json")
    found = json.loads(text.splitlines()[-1])
    assert code == 0 and found["ok"] is True and found["broken"] == []
    assert found["machine"]["cores"] == machine.physical_cores()
    assert {package["extra"] for package in found["packages"]} == {"", *EXTRAS}
    assert found["python"]["torch"].startswith(metadata.version("torch"))


def test_env_and_a_run_are_two_questions(mule_cli: Any) -> None:
    code, _, err = mule_cli("doctor", "runs/mine", "--env")
    assert code == 2
    assert "--env looks at the machine, not at the run runs/mine" in err
    assert "one of the two: mule doctor --env; mule doctor runs/mine" in err
    code, _, err = mule_cli("doctor", "--env", "--rules")
    assert code == 2 and "--explain CODE, --rules or --env, not --rules and --env" in err
    code, _, err = mule_cli("doctor", "--env", "--report")
    assert code == 2 and "--report writes report.md of a run; --env has none" in err


# ---------------------------------------------------------------- packages


def test_every_extra_of_pyproject_is_told() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(EXTRAS) == set(project["optional-dependencies"]) - {"dev"}


def test_the_metadata_says_the_same_as_pyproject(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["torch>=2", 'rich>=14; python_version >= "3"', 'plotly<8,>=7.1; extra == "ui"']
    lines += ['mlx-lm; sys_platform == "linux" and extra == "mlx"']
    message = metadata.metadata("mule")
    monkeypatch.setattr(env_packages, "_PYPROJECT", Path("absent"))
    monkeypatch.setattr(metadata, "requires", lambda name: lines)
    monkeypatch.setattr(metadata, "metadata", lambda name: message)
    asked = {(package.name, package.extra) for package in env_packages.packages()}
    assert {("torch", ""), ("rich", ""), ("plotly", "ui")} <= asked
    assert (("mlx-lm", "mlx") in asked) is (sys.platform == "linux")


@pytest.mark.parametrize(
    ("wanted", "installed", "fits"),
    [(">=2", "2.1+cpu", True), (">=2,<3", "3.0", False), ("", "1", True), (">=1", None, False)],
)
def test_whether_a_version_fits(wanted: str, installed: str | None, fits: bool) -> None:
    assert Package("x", wanted, installed, "").fits is fits


def test_the_command_that_installs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    command = env_packages.install_command([Package("plotly", ">=7.1,<8", None, "ui")])
    assert " -m pip install -c constraints.txt " in command and "plotly" in command
    monkeypatch.chdir(tmp_path)
    assert env_packages.python() == sys.executable


def test_a_package_that_every_run_needs(mule_cli: Any, bare: pytest.MonkeyPatch) -> None:
    _versions(bare, safetensors=None, rich="3.0")
    code, text, _ = mule_cli("doctor", "--env")
    assert code == 1
    assert "broken    every run: safetensors is not installed; Mule needs >=0.6" in text
    assert "broken    every run: rich is 3.0; Mule needs >=14" in text
    assert "-m pip install" in text and "'safetensors>=0.6'" in text
    assert "next: " in text and "pip install" in text.splitlines()[-1]


def test_without_torch_it_still_speaks(bare: pytest.MonkeyPatch) -> None:
    _versions(bare, torch=None)
    found = doctor_env.run()
    assert found["ok"] is False and found["python"]["torch"] == "not installed"
    assert found["measured"] is None
    assert found["broken"][0]["told"].startswith("torch is not installed; Mule needs")


def test_extras_that_lack(bare: pytest.MonkeyPatch) -> None:
    _versions(bare, plotly=None, bitsandbytes="0.1")
    lacking = _capability("mule ui")
    assert (lacking["state"], lacking["told"]) == ("missing", "plotly is not installed")
    assert lacking["get"].endswith("'plotly<8,>=7.1'")
    lacking = _capability("8-bit AdamW")
    assert lacking["state"] == "missing" and "bitsandbytes is 0.1, not " in lacking["told"]
    assert _capability("mlx")["told"] == "no Apple silicon" or platform.system() == "Darwin"
    assert _capability("fp8")["told"].startswith("no GPU that computes float8")


def test_a_folder_that_cannot_be_written(bare: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bare.setattr(os, "access", lambda path, mode: False)
    (broken,) = doctor_env.run()["broken"]
    assert broken["told"] == f"nothing can be written in {tmp_path}, where runs are kept"


# ---------------------------------------------------------------- the machine


def test_a_compiler_that_lacks(bare: pytest.MonkeyPatch) -> None:
    bare.setattr(machine, "cpp_compiler_problem", lambda: "no C++ compiler (g++) is installed")
    bare.setattr(platform, "system", lambda: "Linux")
    found = _capability("compiled training")
    assert (found["state"], found["get"]) == ("missing", "sudo apt install g++ python3-dev")
    assert "no C++ compiler" in found["told"]
    bare.setattr(platform, "system", lambda: "Darwin")
    assert doctor_env._compiler().get == "xcode-select --install"


def test_little_room(bare: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")
    bare.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2**30))
    found = _capability("room for runs")
    assert (found["state"], found["told"]) == ("missing", "1.0 GiB are free here")
    assert found["get"] == "mule runs list, then: rm -r runs/NAME"


def test_gpus(bare: pytest.MonkeyPatch) -> None:
    seen = {"seen": True, "devices": [H100, H100], "mps": False, "error": ""}
    bare.setattr(doctor_env, "_gpus", lambda: seen)
    found = doctor_env.run()
    assert found["machine"]["devices"][0] == {
        "name": "NVIDIA H100",
        "memory_bytes": 80 * 2**30,
        "capability": "9.0",
    }
    able = {c["name"]: c for c in found["capabilities"]}
    assert able["training on a GPU"]["told"] == "NVIDIA H100, NVIDIA H100"
    assert able["several GPUs or machines"]["told"] == "2 GPUs"
    assert able[EXTRAS["fp8"]]["state"] != "not here"
    bare.setattr(doctor_env, "_gpus", lambda: seen | {"devices": [], "mps": True})
    assert _capability("training on a GPU")["told"] == "Apple's GPU (mps)"


def test_a_gpu_that_torch_cannot_use(bare: pytest.MonkeyPatch) -> None:
    bare.setattr(doctor_env, "_sees_gpu", lambda: True)
    bare.setattr(doctor_env, "_ASK_TORCH", 'print(\'{"devices": [], "mps": false}\')')
    found = _capability("training on a GPU")
    assert found["state"] == "missing" and found["get"].endswith("--force-reinstall torch")
    assert "there is a GPU, and torch cannot use it: torch is built for " in found["told"]
    bare.setattr(doctor_env, "_ASK_TORCH", "raise SystemExit('no libcudart')")
    assert _capability("training on a GPU")["told"].endswith("cannot use it: no libcudart")
    bare.setattr(doctor_env, "_ASK_TORCH", "raise SystemExit(3)")
    assert _capability("training on a GPU")["told"].endswith("no word from torch")
    bare.setattr(doctor_env, "_ASK_TORCH", "import time; time.sleep(60)")
    bare.setattr(doctor_env, "_GPU_LIMIT_S", 0.05)
    assert "torch did not answer within 0 s" in _capability("training on a GPU")["told"]


def test_programs_and_slurm(bare: pytest.MonkeyPatch) -> None:
    assert _capability("Ollama")["told"].startswith("ollama is not installed; mule chat")
    assert _capability("several GPUs")["told"].startswith("one device and no Slurm here")
    bare.setattr(shutil, "which", lambda program: f"/usr/bin/{program}")
    assert _capability("Docker") | {"get": ""} == {
        "name": "exported models in Docker",
        "state": "ready",
        "told": "/usr/bin/docker",
        "get": "",
    }
    found = _capability("several GPUs")
    assert found["told"] == "Slurm's sbatch" and found["get"].endswith("--launch slurm:2x8")


def test_what_was_measured_is_told(bare: pytest.MonkeyPatch, mule_cli: Any) -> None:
    known = calibration.Calibration(
        *("cpu", "A processor", 0, (0, 0), "bf16", {"fp32": 1.2e11, "bf16": 3.4e11}, 2.0**34),
        *(1e-6, 10, 10, 1.0),
    )
    bare.setattr(calibration, "is_known", lambda: True)
    bare.setattr(calibration, "calibration", lambda: known)
    _, text, _ = mule_cli("doctor", "--env")
    assert "measured   fp32 120 GFLOP/s, bf16 340 GFLOP/s, reads 16 GiB/s (A processor)" in text


# ---------------------------------------------------------------- the hub


def test_the_token_is_named_but_never_told(
    bare: pytest.MonkeyPatch, mule_cli: Any, tmp_path: Path
) -> None:
    found = _capability("mule push")
    assert (found["state"], found["told"]) == ("missing", "no token; public models need none")
    assert "export HF_TOKEN=hf_..." in found["get"]
    (tmp_path / ".env").write_text(f"HF_TOKEN={TOKEN}\n")
    assert _capability("mule push")["told"] == "a token is set"
    for words in (("doctor", "--env"), ("doctor", "--env", "--json")):
        _, out, err = mule_cli(*words)
        assert TOKEN not in out + err
    (tmp_path / ".env").unlink()
    (tmp_path / "login").write_text(TOKEN)
    assert _capability("mule push")["told"] == "a token is set"
    (tmp_path / ".env").write_text("HF_TOKEN=two words\n")
    found = _capability("mule push")
    assert found["state"] == "missing" and "is not a token" in found["told"]
    bare.setattr(constants, "HF_HUB_OFFLINE", True)
    found = _capability("mule push")
    assert (found["told"], found["get"]) == ("HF_HUB_OFFLINE is set", "unset HF_HUB_OFFLINE")


def test_for_what_torch_was_built(bare: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import importlib.util
    from importlib.machinery import ModuleSpec

    spec = ModuleSpec("torch", None, origin=str(tmp_path / "__init__.py"))
    bare.setattr(importlib.util, "find_spec", lambda name: spec)
    bare.setattr(platform, "system", lambda: "Linux")
    assert doctor_env._built_for() == ""
    for text, told in (
        ("cuda: Optional[str] = '12.8'\nhip: Optional[str] = None\n", "CUDA 12.8"),
        ("cuda: Optional[str] = None\nhip: Optional[str] = '6.4'\n", "ROCm 6.4"),
        ("cuda: Optional[str] = None\n", "the processor"),
    ):
        (tmp_path / "version.py").write_text(text)
        assert doctor_env._built_for() == told
