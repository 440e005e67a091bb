"""Tokenizers that cannot be used as they are: one error each, with the file and the remedy."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from mule import progress
from mule.data.contract import check_template, render_checked
from mule.data.sources.items import Conversation, Message
from mule.errors import ConfigError, DataError, ModelError, UserError
from mule.tokenizer import Tokenizer
from mule.tokenizer import patterns as patterns_module
from mule.tokenizer.core import CHATML

if TYPE_CHECKING:
    from mule.models.config import ModelConfig

CORPUS = ["What is the capital of France? It is Paris.\n" * 9]
ROW = Conversation((Message("user", "a"), Message("assistant", "b")), "a.jsonl", 1)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    Tokenizer.train(CORPUS, 300).save(folder)
    return folder


Change = Callable[[dict[str, Any]], None]


def _changed(good: Path, folder: Path, change: Change, name: str = "tokenizer.json") -> Path:
    for file in good.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    value = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
    change(value)
    (folder / name).write_text(json.dumps(value))
    return folder


def _set(**entries: Any) -> Change:
    return lambda value: value.update(entries)


def _model(**entries: Any) -> Change:
    return lambda value: value["model"].update(entries)


CONFIG, GENERATION = "tokenizer_config.json", "generation_config.json"
BROKEN: dict[str, tuple[str, Change, str]] = {
    "merge outside the vocabulary": (
        "tokenizer.json",
        _model(merges=[["zz", "qq"]]),
        r"tokenizer.json: cut off or not a tokenizer \(.*zz",
    ),
    "no vocabulary": ("tokenizer.json", _model(vocab={}), "tokenizer.json: cut off or not a token"),
    "no model": ("tokenizer.json", _set(model=None), "tokenizer.json: cut off or not a tokenizer"),
    "unknown model": ("tokenizer.json", _model(type="Magic"), "cut off or not a tokenizer"),
    "no added tokens": ("tokenizer.json", _set(added_tokens=7), "cut off or not a tokenizer"),
    "EOS is no token": (
        CONFIG,
        _set(eos_token="</nothing>"),
        r"eos_token is '</nothing>' in tokenizer_config.json, which is no token of tokenizer.json",
    ),
    "stop id too large": (GENERATION, _set(eos_token_id=300), "eos_token_id 300 is no id of the"),
    "stop id negative": (GENERATION, _set(eos_token_id=[1, -1]), "eos_token_id -1 is no id of the"),
    "stop id as text": (GENERATION, _set(eos_token_id="2"), 'eos_token_id "2" is no id of the'),
    "stop id true": (GENERATION, _set(eos_token_id=True), "eos_token_id true is no id of the tok"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files_are_refused(good: Path, tmp_path: Path, case: str) -> None:
    name, change, message = BROKEN[case]
    folder = _changed(good, tmp_path, change, name)
    before = {file: file.read_bytes() for file in folder.iterdir()}
    with pytest.raises(ModelError, match=message) as caught:
        Tokenizer.load(folder)
    assert "copy" in caught.value.hint
    assert caught.value.exit_code == 2
    assert {file: file.read_bytes() for file in folder.iterdir()} == before


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_a_file_that_is_cut_off(good: Path, tmp_path: Path, share: float) -> None:
    text = (good / "tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text(text[: int(len(text) * share)])
    with pytest.raises(ModelError, match=r"tokenizer.json: cut off or not a tokenizer"):
        Tokenizer.load(tmp_path)


# ---------------------------------------------------------------- EOS, PAD, BOS


def test_no_token_ends_a_text(tmp_path: Path) -> None:
    Backend(models.BPE(vocab={"a": 0}, merges=[])).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ModelError, match="names no token that ends a text"):
        Tokenizer.load(tmp_path)


def test_pad_may_be_eos(good: Path, tmp_path: Path) -> None:
    """Labels do not come from the padding, so the stop token is trained all the same."""
    tokenizer = Tokenizer.load(_changed(good, tmp_path, _set(pad_token="<|im_end|>"), CONFIG))
    (example,) = render_checked(tokenizer, [ROW])[0]
    assert example.ids[-1] == tokenizer.pad_id == tokenizer.eos_id
    assert example.trained[-1]


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (
            "{{ bos_token }}{{ bos_token }}",
            r"2 begin-of-text tokens \(<\|endoftext\|>\) in one row",
        ),
        ("", r"does not begin with the begin-of-text token \(<\|endoftext\|>\)"),
    ],
)
def test_bos_twice_or_never(good: Path, tmp_path: Path, start: str, message: str) -> None:
    config = _set(bos_token="<|endoftext|>", add_bos_token=True)
    _changed(good, tmp_path, config, CONFIG)
    (tmp_path / "special_tokens_map.json").unlink()
    (tmp_path / "chat_template.jinja").write_text(start + CHATML)
    tokenizer = Tokenizer.load(tmp_path)
    with pytest.raises(DataError, match=f"a.jsonl:1: .*{message}(.|\n)*hint: "):
        render_checked(tokenizer, [ROW])
    with pytest.raises(ModelError, match=f"chat template: .*{message}"):
        check_template(tokenizer)


# ---------------------------------------------------------------- characters and ids


@pytest.fixture(scope="module")
def letters() -> Backend:
    """Neither bytes nor unk: as seen in the wild, unknown characters vanish."""
    backend = Backend(models.BPE(vocab={"a": 0, "b": 1, "é": 2, "</s>": 3}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens([AddedToken("</s>", special=True, normalized=False)])
    return backend


def test_unknown_characters_are_not_dropped_in_silence(letters: Backend, tmp_path: Path) -> None:
    letters.save(str(tmp_path / "tokenizer.json"))
    assert letters.encode("aXb").ids == [0, 1]  # the library's word
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.encode("ab é a") == [0, 1, 2, 0]
    assert tokenizer.encode("ab</s>", special=True) == [0, 1, 3]
    message = r"no token for 'X' \(U\+0058\) at position 4, and would drop it(.|\n)*byte-level"
    for call in (tokenizer.encode, lambda text: tokenizer.encode_batch(["ab", text])):
        with pytest.raises(UserError, match=message):
            call("é abXa")


def test_bytes_and_unk_keep_unknown_characters(letters: Backend, tmp_path: Path) -> None:
    value = json.loads(letters.to_str())
    value["model"]["unk_token"] = "</s>"
    (tmp_path / "tokenizer.json").write_text(json.dumps(value))
    assert Tokenizer.load(tmp_path).encode("aXb") == [0, 3, 1]
    assert Tokenizer.train(CORPUS, 300).encode("\U0001f3f4")


@pytest.mark.parametrize("token_id", [-1, 300, 2**40])
def test_an_id_out_of_range(good: Path, token_id: int) -> None:
    with pytest.raises(UserError, match=rf"token id {token_id} is not in this tokenizer"):
        Tokenizer.load(good).decode([1, token_id])


# ---------------------------------------------------------------- patterns


def _with_pattern(folder: Path, pattern: str) -> Path:
    backend = Backend(models.BPE(vocab={"a": 0, "</s>": 1}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["</s>"])
    backend.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize("pattern", [r"(a+)+$", r"(\w|\w\w)+\.$", r"(x+x+)+y", r"(?:\s*\s*)*!"])
def test_a_pattern_that_takes_exponential_time(tmp_path: Path, pattern: str) -> None:
    with pytest.raises(ModelError, match="takes exponential time on some texts") as caught:
        Tokenizer.load(_with_pattern(tmp_path, pattern))
    assert str(tmp_path / "tokenizer.json") in caught.value.message
    assert pattern in caught.value.message


def test_a_pattern_that_hangs_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns_module, "_CHILD", "import time; time.sleep(60)")
    monkeypatch.setattr(patterns_module, "_TIME_LIMIT_S", 0.2)
    started_at = time.perf_counter()
    with pytest.raises(ModelError, match="takes exponential time"):
        Tokenizer.load(_with_pattern(tmp_path, "a|b"))
    assert time.perf_counter() - started_at < 10


def test_published_patterns_are_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    o200k = (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+"
    )
    Tokenizer.load(_with_pattern(tmp_path, o200k))
    monkeypatch.setattr(patterns_module, "_ends", lambda pattern: False)
    for pattern in patterns_module.PATTERNS:  # no process is started for these
        Tokenizer.load(_with_pattern(tmp_path, pattern))


# ---------------------------------------------------------------- training


def test_a_corpus_smaller_than_the_vocabulary_is_said() -> None:
    class Notes(progress.Silence):
        texts: list[str] = []  # noqa: RUF012

        def note(self, text: str, level: str) -> None:
            self.texts.append(text)

    with progress.using(Notes()):
        tokenizer = Tokenizer.train(["ab"], 9000)
    found = f"the texts hold {tokenizer.vocab_size} tokens, fewer than the 9,000 asked for"
    assert found in Notes.texts


def test_more_tokens_than_the_model_has_rows(good: Path) -> None:
    from mule.config.load import load_recipe
    from mule.train.assemble import _check_fit

    recipe = load_recipe(None, ["data.train=a.jsonl", "model.size=25m"]).recipe
    tokenizer = Tokenizer.load(good)
    rows = tokenizer.vocab_size - 1
    config = cast("ModelConfig", SimpleNamespace(vocab_size=rows, max_position_embeddings=10**6))
    message = rf"{rows + 1} tokens, the model {rows} embedding rows(.|\n)*hint: use the tokenizer"
    with pytest.raises(ConfigError, match=message):
        _check_fit(recipe, config, tokenizer)
