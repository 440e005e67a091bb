"""Models of the hub, fetched by the real library from a small server on this machine."""

from __future__ import annotations

import contextvars
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from mule.config.load import load_recipe
from mule.errors import ModelError
from mule.hub.repo import Repo, address_of
from mule.hub.token import token
from mule.models.families import family
from mule.models.hub import hub_repo
from tests.hub_server import Files, HubServer
from tests.tiny import TINY

CONFIG = family("qwen3").to_hf(TINY)
NOT_FETCHED = {
    "consolidated.safetensors": b"the same weights again",
    "pytorch_model.bin": b"and again",
    "modeling_own.py": b"raise SystemExit('code of a model folder was run')",
    "model-q4.gguf": b"GGUF",
    "onnx/model.onnx": b"onnx",
    "original/params.json": b"{}",
}
TOKENIZER = {"tokenizer.json": b'{"model": {}}', "tokenizer_config.json": b"{}"}
_CHILD = """
import json, sys
from mule import progress
from mule.errors import MuleError
from mule.hub.token import look_for_token_in
from mule.models.hub import fetch_model, hub_repo
from pathlib import Path
look_for_token_in(Path("recipes"))
notes, told, found = [], [], []
class Sink(progress.Silence):
    def note(self, text, level): notes.append(text)
    def advance(self, key, amount, fields): told.append(amount)
with progress.using(Sink()):
    for text in sys.argv[1:]:
        try:
            weights = not text.startswith("tokenizer of ")
            text = text.removeprefix("tokenizer of ")
            found.append(str(fetch_model(text, hub_repo(text), weights=weights)))
        except MuleError as error:
            found.append([type(error).__name__, error.message, error.hint])
print(json.dumps({"found": found, "notes": notes, "bytes": sum(told)}))
"""


def as_json(value: Any) -> bytes:
    return json.dumps(value).encode()


def model_files(size: int = 3000, **config: Any) -> Files:
    """A repository as the hub has them: two shards of weights, and much that is not needed."""
    weight_map = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    shards = {
        file: save({name: torch.full((size,), float(ord(name)))})
        for name, file in weight_map.items()
    }
    return {
        "config.json": as_json(CONFIG | {"auto_map": {"AutoModel": "modeling_own.M"}} | config),
        "generation_config.json": b'{"eos_token_id": 3}',  # one blob a content: all differ
        "model.safetensors.index.json": as_json({"weight_map": weight_map}),
        "chat_template.jinja": b"{{ messages }}",
        "LICENSE": b"Apache-2.0",
        "README.md": b"---\nlicense: apache-2.0\n---\n",
        **TOKENIZER,
        **shards,
        **NOT_FETCHED,
    }


class Hub(HubServer):
    def fetch(self, *names: str, **environment: str) -> dict[str, Any]:
        return self.run(_CHILD, names, **environment)

    def error(self, name: str, **environment: str) -> tuple[str, str, str]:
        """(class, message, hint)"""
        (found,) = self.fetch(name, **environment)["found"]
        assert isinstance(found, list), found
        return tuple(found)

    def weights_asked(self) -> list[str]:
        return [path for path in self.paths() if "/cdn/" in path or path.endswith("safetensors")]


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    running = Hub(tmp_path)
    yield running
    running.stop()


# ---------------------------------------------------------------- what is fetched


def test_fetched_pinned_cached_and_offline(hub: Hub) -> None:
    files = model_files()
    commit = hub.repo("org/tiny").push(files)
    told = hub.fetch("org/tiny", "org/tiny")
    folder = Path(told["found"][0])
    assert told["found"] == [str(folder)] * 2
    assert folder.parts[-3:] == ("models--org--tiny", "snapshots", commit)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == {
        name: files[name] for name in files.keys() - NOT_FETCHED.keys()
    }
    fetching, pinned = told["notes"]  # once
    assert fetching == f"org/tiny: fetching 0.02 MB into {folder.parent.parent}"
    assert pinned == (
        f"org/tiny: main is commit {commit}; to use exactly this one again, write org/tiny@{commit}"
    )
    assert told["bytes"] == sum(len(files[f.name]) for f in folder.iterdir())

    hub.asked.clear()
    assert hub.fetch(f"org/tiny@{commit}") == {"found": [str(folder)], "notes": [], "bytes": 0}
    assert hub.asked == []  # a commit never changes
    again = hub.fetch("org/tiny")
    assert (again["found"], again["bytes"]) == ([str(folder)], 0)
    assert hub.paths() == ["/api/models/org/tiny/revision/main"]

    hub.stop()
    reasons = {"": "the hub cannot be reached", "1": "HF_HUB_OFFLINE is set"}
    for offline, why in reasons.items():
        cached = hub.fetch("org/tiny", HF_HUB_OFFLINE=offline)
        assert cached["found"] == [str(folder)]
        used = f"its cache has commit {commit}, which is used"
        assert cached["notes"] == [f"org/tiny: {why}; {used}"]


def test_a_moved_branch_a_tag_and_only_the_tokenizer(hub: Hub) -> None:
    repo = hub.repo("org/tiny")
    first = repo.push(model_files())
    repo.branches["v1.0"] = first
    assert Path(hub.fetch("tokenizer of org/tiny")["found"][0]).name == first
    assert hub.weights_asked() == []
    assert Path(hub.fetch("org/tiny")["found"][0]).name == first
    second = repo.push(model_files(rope_theta=5000.0))
    hub.asked.clear()
    moved, tagged = hub.fetch("org/tiny", "org/tiny@v1.0")["found"]
    assert (Path(moved).name, Path(tagged).name) == (second, first)
    assert hub.weights_asked() == []  # the same files: they lie in the cache


@pytest.mark.parametrize("how", ["killed", "broken off"])
def test_an_interrupted_download_goes_on(hub: Hub, how: str) -> None:
    files = model_files(size=4_000_000)
    commit = hub.repo("org/tiny").push(files)
    large = sum(len(files[name]) for name in files if name.startswith("model-0"))
    hub.stop_after = 12_000_000
    child = hub.start(_CHILD, "org/tiny")
    assert hub.stopped.wait(60)
    blobs = hub.home / "hf" / "hub" / "models--org--tiny" / "blobs"
    if how == "killed":
        while not any(file.stat().st_size > 10_000_000 for file in blobs.glob("*.mule.incomplete")):
            assert child.poll() is None
        os.kill(child.pid, signal.SIGKILL)
        child.communicate()
        assert child.returncode == -signal.SIGKILL
        hub.go_on.set()
    else:
        hub.stop_after = 0
        hub.failing["/cdn/"] = (503, {})
        hub.go_on.set()
        (found,) = json.loads(child.communicate(timeout=60)[0])["found"]
        assert found[1] == "org/tiny: the hub answers with an error (503)"
        assert found[2].startswith("try again later: what came is kept")
        hub.failing.clear()
    (partial,) = blobs.glob("*.mule.incomplete")
    kept = partial.stat().st_size
    assert 10_000_000 < kept < 12_000_000  # the library writes 10 MiB at a time
    hub.stop_after = hub.sent_bytes = 0
    hub.asked.clear()

    told = hub.fetch("org/tiny")
    folder = Path(told["found"][0])
    assert folder.name == commit
    for name in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"):
        assert (folder / name).read_bytes() == files[name]
    ranges = [range_ for _, path, range_, _ in hub.asked if "/cdn/" in path and range_]
    assert ranges == [f"bytes={kept}-"]
    assert told["notes"][0].endswith(", 10 MB of it is here from before")
    assert hub.sent_bytes < large - kept + 50_000
    assert not list(blobs.glob("*.incomplete"))


def test_a_connection_that_breaks_is_taken_up_again(hub: Hub) -> None:
    files = model_files(size=4_000_000)
    hub.repo("org/tiny").push(files)
    hub.stop_after = 12_000_000
    child = hub.start(_CHILD, "org/tiny")
    assert hub.stopped.wait(60)
    hub.stop_after = 0
    hub.go_on.set()  # the server closes the connection in the middle of the file
    out, err = child.communicate(timeout=60)
    assert err == ""
    name = "model-00001-of-00002.safetensors"
    assert (Path(json.loads(out)["found"][0]) / name).read_bytes() == files[name]


@pytest.mark.slow
def test_the_network_goes_away_in_the_middle(hub: Hub) -> None:
    hub.repo("org/tiny").push(model_files(size=4_000_000))
    hub.stop_after = 12_000_000
    child = hub.start(_CHILD, "org/tiny")
    assert hub.stopped.wait(60)
    hub.stop()
    (found,) = json.loads(child.communicate(timeout=120)[0])["found"]
    name = "model-00001-of-00002.safetensors"
    assert found[1] == f"org/tiny: the connection broke off at 10 MB of 16 MB of {name}"
    assert found[2] == "give the same command again: it goes on from there"


@pytest.mark.slow
def test_two_processes_fetch_a_file_once(hub: Hub) -> None:
    hub.repo("org/tiny").push(model_files(size=4_000_000))
    hub.stop_after = 12_000_000
    first = hub.start(_CHILD, "org/tiny")
    assert hub.stopped.wait(60)
    hub.stop_after = 0
    second = hub.start(_CHILD, "org/tiny")
    deadline = time.monotonic() + 60
    while hub.paths().count("/api/models/org/tiny/revision/main") < 2:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    time.sleep(2)  # it reaches the lock soon after
    hub.go_on.set()
    told = [json.loads(child.communicate(timeout=120)[0]) for child in (first, second)]
    assert told[0]["found"] == told[1]["found"]
    name = "model-00001-of-00002.safetensors"
    waiting = f"org/tiny: another process fetches {name}; waiting for it"
    assert [waiting in each["notes"] for each in told] == [False, True]


def test_a_damaged_download(hub: Hub) -> None:
    files = model_files()
    hub.repo("org/tiny").push(files)
    hub.spoilt = True
    kind, message, hint = hub.error("org/tiny")
    assert kind == "StorageError"
    assert message.startswith(
        "org/tiny: model-00001-of-00002.safetensors came damaged (its SHA-256"
    )
    assert hint == "it was removed; give the same command again to fetch it anew"
    hub.spoilt = False
    assert Path(hub.fetch("org/tiny")["found"][0]).is_dir()


def test_a_part_in_the_cache_is_not_enough(hub: Hub) -> None:
    hub.repo("org/tiny").push(model_files())
    (folder,) = hub.fetch("tokenizer of org/tiny")["found"]
    assert hub.fetch("tokenizer of org/tiny", HF_HUB_OFFLINE="1")["found"] == [folder]
    _, message, hint = hub.error("org/tiny", HF_HUB_OFFLINE="1")
    assert message.startswith("org/tiny: only in part in the hub's cache (")
    assert message.endswith("/hf/hub), and HF_HUB_OFFLINE is set")
    assert hint.startswith("fetch it once with network (unset HF_HUB_OFFLINE), or name a local")
    hub.stop()
    _, message, hint = hub.error("org/tiny")
    assert message == "org/tiny: the hub cannot be reached, and its cache holds only a part of it"
    assert hint.startswith("check the network and give the same command again (what came is kept)")


# ---------------------------------------------------------------- disk and token


def test_a_disk_that_fills_up(hub: Hub) -> None:
    """A limit on the size of files stands for it: the system refuses the write in the same way."""
    hub.repo("org/tiny").push(model_files(size=4_000_000))
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (5_000_000, 5_000_000))\n"
    (found,) = hub.run(limit + _CHILD, ["org/tiny"])["found"]
    kind, message, hint = found
    assert kind == "StorageError"
    assert message.startswith("cannot write ")
    assert message.endswith(".mule.incomplete: the file would exceed the allowed size")
    assert hint == "raise the file size limit (ulimit -f)"


def test_the_token_of_an_env_file(hub: Hub) -> None:
    gated = hub.repo("org/gated")
    gated.push(model_files())
    gated.gate, gated.opens_with = (401, {"X-Error-Code": "GatedRepo"}), "hf_right"
    _, message, hint = hub.error("org/gated")
    assert message == "org/gated: its owner asks you to accept terms first"
    assert hint == (
        "accept them at https://huggingface.co/org/gated, then set HF_TOKEN (make one at "
        "https://huggingface.co/settings/tokens), or write HF_TOKEN=... into .env"
    )
    assert hub.weights_asked() == []

    (hub.home / ".env").write_text("HF_TOKEN=hf_wrong\n")
    (hub.home / "recipes").mkdir()
    beside = hub.home / "recipes" / ".env"
    beside.write_text("# mine\nOTHER=1\nexport HF_TOKEN = 'hf_right'\nHF_HUB_OFFLINE=1\n")
    hub.asked.clear()
    told = hub.fetch("org/gated")
    assert {token for *_, token in hub.asked} <= {"hf_right", ""}
    assert Path(told["found"][0]).is_dir()
    assert "hf_right" not in json.dumps(told)
    kept = [file for file in (hub.home / "hf").rglob("*") if file.is_file()]
    assert not [file for file in kept if b"hf_right" in file.read_bytes()]

    hub.asked.clear()
    hub.fetch("org/nothing", HF_TOKEN="hf_of_environment")
    assert {token for *_, token in hub.asked} == {"hf_of_environment"}
    beside.unlink()
    hub.asked.clear()
    hub.fetch("org/nothing")
    assert {token for *_, token in hub.asked} == {"hf_wrong"}
    beside.write_text("HF_TOKEN=two words\n")
    kind, message, hint = hub.error("org/nothing")
    assert kind == "UserError"
    assert message.endswith(
        ".env: the value of HF_TOKEN is not a token (it holds spaces or other signs)"
    )
    assert hint.startswith("copy it again from https://huggingface.co/settings/tokens")
    assert "two words" not in message + hint
    beside.write_bytes(b"\xff\xfe")
    assert "cannot be read as text" in hub.error("org/nothing")[1]


# ---------------------------------------------------------------- what the hub refuses


@pytest.mark.parametrize(
    ("status", "headers", "message", "hint"),
    [
        (401, {"X-Error-Message": "Invalid credentials in Authorization header"},
         "the hub does not accept your token (401)", "make a new one at https://"),
        (403, {}, "your token may not read it (403)", "give the token the right to read it at https://"),
        (429, {}, "the hub asks for fewer requests (429)", "wait some minutes and give the same"),
        (500, {}, "the hub answers with an error (500)", "try again later: what came is kept"),
        (401, {}, "neither a run, a folder nor a file here, nor a model that the hub shows you",
         "check the name at https://huggingface.co/org/tiny; a gated or private one looks missing "
         "too without a token: accept its terms there, then set HF_TOKEN"),
    ],
)  # fmt: skip
def test_what_the_hub_answers(
    hub: Hub, status: int, headers: dict[str, str], message: str, hint: str
) -> None:
    hub.failing["/api/"] = (status, headers)
    given = {"HF_TOKEN": "hf_any"} if "token" in message else {}
    kind, found, way_out = hub.error("org/tiny", **given)
    assert (kind, found) == ("ModelError", f"org/tiny: {message}")
    assert way_out.startswith(hint)


def test_no_such_repository_or_revision(hub: Hub) -> None:
    hub.repo("org/tiny").push(model_files())
    nothing, revision = hub.fetch("org/nothing", "org/tiny@v9")["found"]
    assert nothing[1].startswith(
        "org/nothing: neither a run, a folder nor a file here, nor a model"
    )
    assert revision[1] == "org/tiny@v9: the model has no revision 'v9'"
    assert (
        revision[2]
        == "see its branches and commits at https://huggingface.co/org/tiny/commits/main"
    )
    hub.stop()
    _, message, _ = hub.error("org/tiny")
    assert message == "org/tiny: the hub cannot be reached, and its cache does not hold it"


def test_what_is_no_hub_and_no_name(hub: Hub) -> None:
    hub.repo("org/tiny").push(model_files())
    hub.failing["config.json"] = (200, {})  # as a captive portal answers
    _, message, hint = hub.error("org/tiny")
    assert message.startswith("org/tiny: it could not be fetched (Response from http")
    assert hint == "try again later, or download the files by hand"
    _, message, hint = hub.error("org/a--b")
    assert (message, hint) == ("org/a--b: not a valid name of a hub model", "write ORG/NAME")


def test_a_model_larger_than_the_disk(hub: Hub) -> None:
    hub.repo("org/tiny").push(model_files())
    hub.claimed_bytes = 10**18
    kind, message, hint = hub.error("org/tiny")
    assert kind == "StorageError"
    assert message.startswith("org/tiny (")
    assert "MiB free" in message
    assert hint.endswith("keep the hub's cache on a larger disk: export HF_HOME=FOLDER")
    assert hub.weights_asked() == []


# ---------------------------------------------------------------- what Mule refuses


def without(files: Files, *suffixes: str) -> Files:
    return {name: body for name, body in files.items() if not name.endswith(suffixes)}


def quantised(settings: dict[str, Any], key: str = "quantization_config", **more: Any) -> Files:
    config: dict[str, Any] = {key: settings} | more
    return without(model_files(3000, **config), ".gguf", ".bin")


@pytest.mark.parametrize(
    ("files", "card", "message", "hint"),
    [
        ({"a-q4_0.gguf": b"", "a-q8_0.gguf": b"", "README.md": b""}, {"base_model": ["org/full"]},
         "holds GGUF files only (a-q4_0.gguf and 1 more), made for llama.cpp: they can be run, not",
         "to train, use the model it was made from: org/full; to run one, fetch the file: mule chat "
         "a-q4_0.gguf"),
        ({"a.gguf": b"", "config.json": as_json(CONFIG)}, {}, "holds GGUF files only (a.gguf)",
         "to train, use the unquantised model it was made from; https://huggingface.co/org/odd "
         "should name it"),
        (quantised({"quant_method": "gptq", "bits": 4}), {"base_model": "org/full"},
         "its weights are quantised (GPTQ), so they cannot be trained, exported or merged into",
         "use the model it was made from: org/full; adapter.kind=qlora keeps it in 4 bits here"),
        (quantised({"quant_method": "awq"}, _name_or_path="org/named"), {},
         "its weights are quantised (AWQ)", "use the model it was made from: org/named"),
        (quantised({"load_in_4bit": True}), {}, "its weights are quantised (bitsandbytes)",
         "use the unquantised model it was made from; https://huggingface.co/org/odd should"),
        (quantised({"group_size": 64, "bits": 4}, "quantization"), {},
         "its weights are quantised (MLX)", "use the unquantised model"),
        (without(model_files(), ".safetensors", ".gguf", ".json") | TOKENIZER
         | {"config.json": as_json(CONFIG)}, {},
         "its weights are pickle files (pytorch_model.bin), which can run code when read",
         "fetch and convert it, in a process that runs nothing of it: hf download org/odd "
         "--local-dir odd, then mule convert odd/pytorch_model.bin --out odd-converted"),
        ({"config.json": as_json(CONFIG), **TOKENIZER, "pytorch_model-00001-of-00002.bin": b"",
          "pytorch_model-00002-of-00002.bin": b""}, {}, "its weights are pickle files (",
         "look for one with safetensors at https://huggingface.co/org/odd/discussions"),
        ({"config.json": as_json(CONFIG), "tf_model.h5": b""}, {},
         "its weights are for TensorFlow (tf_model.h5)", "use a model with model.safetensors"),
        ({"config.json": as_json(CONFIG)}, {}, "no model.safetensors and no", "use a model with saf"),
        (model_files(model_type="mamba"), {}, "model_type 'mamba' is not a family that Mule knows",
         "use a model of one of these: llama, "),
        ({"config.json": b"{}"}, {}, "its config.json names no model_type", "use a model in transf"),
        ({"config.json": b"[]"}, {}, "its config.json is not a JSON object", "see https://hugg"),
        ({"model_index.json": b"{}"}, {}, "an image model (diffusers)", "name a language model"),
        ({"README.md": b""}, {}, "not a model in transformers' layout (no config.json)",
         "name a model with config.json, tokenizer.json and model.safetensors"),
        (without(model_files(), "tokenizer.json") | {"tokenizer.model": b""}, {},
         "of tokenizers it has only a SentencePiece one (tokenizer.model); Mule reads tokenizer.json",
         "write one with transformers: AutoTokenizer.from_pretrained(...)"),
        (without(model_files(), "00002-of-00002.safetensors"), {},
         "its index names model-00002-of-00002.safetensors, which the repository does not hold",
         "tell its owner at https://huggingface.co/org/odd/discussions"),
    ],
)  # fmt: skip
def test_refused_before_weights_are_fetched(
    hub: Hub, files: Files, card: dict[str, Any], message: str, hint: str
) -> None:
    hub.repo("org/odd").push(files)
    hub.repo("org/odd").card = card
    kind, found, way_out = hub.error("org/odd")
    assert kind == "ModelError"
    assert found.startswith(f"org/odd: {message}")
    assert way_out.startswith(hint)
    assert hub.weights_asked() == []


def test_an_adapter_on_the_hub(hub: Hub) -> None:
    files = {"adapter_config.json": b"{}", "adapter_model.safetensors": save({"a": torch.ones(3)})}
    hub.repo("org/adapter").push(files | NOT_FETCHED)
    (folder,) = hub.fetch("org/adapter")["found"]
    assert {file.name for file in Path(folder).iterdir()} == files.keys()
    assert hub.fetch("org/adapter", HF_HUB_OFFLINE="1")["found"] == [folder]


# ---------------------------------------------------------------- what is a name of the hub


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("org/name", Repo("model", "org/name")),
        ("org/name@v1", Repo("model", "org/name", "v1")),
        ("org/name@refs/pr/3", Repo("model", "org/name", "refs/pr/3")),
        ("hf://here/name", Repo("model", "here/name")),
        ("https://huggingface.co/Qwen/Qwen2.5-0.5B/", Repo("model", "Qwen/Qwen2.5-0.5B")),
        ("here/name", None),  # a folder
        ("./org/name", None),
        ("/org/name", None),
        ("../org/name", None),
        ("~/name", None),
        ("runs/tuned", None),
        ("exports/tuned", None),
        ("name", None),
        ("a/b/c", None),
        ("models/tuned.gguf", None),
        ("models/tuned.bin", None),
        ("hf://datasets/org/name", None),
        ("https://huggingface.co/datasets/org/name", None),
    ],
)
def test_what_names_a_model_of_the_hub(
    text: str, expected: Repo | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("here").mkdir()
    assert hub_repo(text) == expected


def test_revisions_of_a_name() -> None:
    assert hub_repo("org/name", "v2") == Repo("model", "org/name", "v2")
    assert hub_repo("org/name@v2", "v2") == Repo("model", "org/name", "v2")
    with pytest.raises(ModelError, match=r"and so does model\.revision") as two:
        hub_repo("org/name@v1", "v2")
    assert two.value.hint == "leave out one of the two"
    with pytest.raises(ModelError, match=r"\.\./\.\.: not a branch, tag or commit"):
        hub_repo("org/name", "../..")


def test_the_address_of_a_cached_folder() -> None:
    cached = Path("/cache/hub/models--org--name/snapshots/0123")
    assert address_of(cached) == ("org/name", "0123")
    assert address_of(Path("/a/snapshots/b")) is None
    assert address_of(Path("/cache/hub/datasets--org--name/snapshots/0123")) is None


def test_the_env_file_beside_a_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    (tmp_path / "kept").mkdir()
    recipe = tmp_path / "kept" / "recipe.yaml"
    recipe.write_text("model: {path: org/tiny}\ndata: {train: [a.jsonl]}\n")

    def loaded() -> str | None:
        load_recipe(recipe)
        return token()

    assert contextvars.copy_context().run(loaded) is None
    (tmp_path / "kept" / ".env").write_text('HF_TOKEN="hf_beside"\n')
    assert contextvars.copy_context().run(loaded) == "hf_beside"
    monkeypatch.setenv("HF_TOKEN", "hf_set")
    assert contextvars.copy_context().run(loaded) is None  # the library takes it from there
