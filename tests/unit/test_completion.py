"""`mule --install-completion`: what it writes, and that a real shell completes with it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

BIN = Path(sys.executable).parent  # has `mule`
SHELLS = ("bash", "zsh", "fish")


def _in_shell(shell: str, script: str, home: Path) -> str:
    """What a shell prints that has `mule` on its path and an empty home."""
    found = shutil.which(shell)
    if found is None:
        pytest.skip(f"{shell} is not installed")
    env = {"HOME": str(home), "PATH": f"{BIN}:/usr/bin:/bin", "ZDOTDIR": str(home)}
    ran = subprocess.run(
        [found, "-c", script], env=env, capture_output=True, text=True, timeout=60, check=False
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_bash_completes_verbs_and_options(tmp_path: Path) -> None:
    (tmp_path / ".bashrc").write_text("# mine\n")
    script = """
    mule --install-completion
    . ~/.bashrc
    COMP_WORDS=(mule do); COMP_CWORD=1; _mule_completion mule; echo "verbs: ${COMPREPLY[*]}"
    COMP_WORDS=(mule doctor --e); COMP_CWORD=2; _mule_completion mule; echo "options: ${COMPREPLY[*]}"
    """
    text = _in_shell("bash", script, tmp_path)
    assert f"bash completion installed in {tmp_path}/.bash_completions/mule.sh" in text
    assert "verbs: doctor" in text
    assert "options: --explain --env" in text.replace("\n", " ")
    assert (tmp_path / ".bashrc").read_text().startswith("# mine\n")


@pytest.mark.parametrize("shell", SHELLS)
def test_each_shell_reads_its_script(shell: str, tmp_path: Path) -> None:
    script = _in_shell(shell, "mule --show-completion; true", tmp_path)
    file = tmp_path / "script"
    file.write_text(script)
    assert "_MULE_COMPLETE" in script
    _in_shell(shell, f"{shell} -n {file}", tmp_path)
