"""Nothing that runs code found in a file, and nothing about the machines Mule is written on."""

from __future__ import annotations

import ast
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.house.source import ALLOWLIST, ROOT, Module, imports, modules

MODULES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
CALLS = {
    "torch.load": "use safetensors",
    "torch.save": "use safetensors",
    "yaml.load": "use mule.config.reader",
    "os.system": "use subprocess with a list",
    "os.popen": "use subprocess with a list",
    "eval": "runs text as code",
    "exec": "runs text as code",
    "__import__": "runs a module named by text",
}
KEYWORDS = {"trust_remote_code", "allow_pickle"}
# Written in halves, so that this file passes its own test.
WORDS = ("/wo" + "rk/", "/opt/wh" + "eels", "/opt/py" + "pi", "pypi" + ".org", "python" + "hosted")


def _offences(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, what) of each forbidden construct."""
    for name, line in imports(tree):
        if name.split(".")[0] in MODULES:
            yield line, f"imports {name}: a file could run code"
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        if called in CALLS:
            yield node.lineno, f"calls {called}: {CALLS[called]}"
        for keyword in node.keywords:
            on = not (isinstance(keyword.value, ast.Constant) and keyword.value.value is False)
            if (keyword.arg in KEYWORDS or keyword.arg == "shell") and on:
                yield node.lineno, f"passes {keyword.arg}={ast.unparse(keyword.value)}"


def _place(module: Module, what: str) -> str:
    """How the allowlist names an offence: `path::what` without the reason it is one."""
    return f"{module.path}::{what.partition(':')[0]}"


@pytest.mark.parametrize("module", modules("mule", "bench"), ids=lambda module: module.path)
def test_no_file_can_run_code(module: Module) -> None:
    wrong = [
        f"{module.path}:{line}: {what}"
        for line, what in _offences(module.tree)
        if _place(module, what) not in ALLOWLIST["unsafe"]
    ]
    assert not wrong, "\n".join(wrong)


def test_no_excuse_is_idle() -> None:
    found = {
        _place(module, what)
        for module in modules("mule", "bench")
        for _, what in _offences(module.tree)
    }
    assert ALLOWLIST["unsafe"].keys() <= found


def test_the_one_reader_of_pickles_reads_weights_only() -> None:
    (worker,) = (m for m in modules("mule") if m.path == "mule/models/_unpickle_worker.py")
    calls = [node for node in ast.walk(worker.tree) if isinstance(node, ast.Call)]
    (load,) = (call for call in calls if ast.unparse(call.func) == "torch.load")
    assert "weights_only=True" in [ast.unparse(keyword) for keyword in load.keywords]


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from joblib import load",
        "torch.load(f)",
        "np.load(f, allow_pickle=True)",
        "AutoModel.from_pretrained(p, trust_remote_code=flag)",
        "yaml.load(f)",
        "eval(text)",
        "subprocess.run(c, shell=True)",
    ],
)
def test_the_test_sees_it(code: str) -> None:
    assert list(_offences(ast.parse(code)))


@pytest.mark.parametrize("code", ["model.eval()", "f(trust_remote_code=False)", "re.compile('a')"])
def test_the_test_lets_the_rest_pass(code: str) -> None:
    assert not list(_offences(ast.parse(code)))


def _kept_files() -> list[Path]:
    """What git tracks or would track."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if ran.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in ran.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_no_file_names_a_development_machine() -> None:
    wrong = []
    for file in _kept_files():
        text = file.read_bytes().decode("utf-8", errors="replace")
        wrong += [
            f"{file.relative_to(ROOT)}:{number}: {word}"
            for number, line in enumerate(text.splitlines(), 1)
            for word in WORDS
            if word in line
        ]
    assert not wrong, "\n".join(wrong)
