"""Each splitting of text that Mule writes gets the same ids in llama.cpp."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from mule import tokenizer
from mule.export.gguf import write_gguf
from mule.export.proof import proof_texts
from mule.export.splitting import _GPT2, _LLAMA3, _QWEN2
from mule.export.verify import verify
from mule.generate.llamacpp import LlamaCpp
from tests.parity.tiny_gguf import PROMPTS, TEXTS, TorchReference, edit_json, save_tiny

BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
SPLITTINGS = {
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "gpt-2 as a regex": _GPT2,
    "smollm": pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
    "llama-bpe": _LLAMA3,
    "smaug-bpe": _LLAMA3,
    "qwen2": _QWEN2,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokens")
    save_tiny(path, "qwen3", num_hidden_layers=1, vocab_size=1009)
    return path


def train(folder: Path, name: str) -> None:
    """Put a tokenizer with this splitting into the folder."""
    splitting = SPLITTINGS[name]
    if isinstance(splitting, str):
        parts = [pre_tokenizers.Split(Regex(splitting), "isolated"), BYTES]
        splitting = pre_tokenizers.Sequence(parts)
    backend = Tokenizer(models.BPE(ignore_merges=name == "llama-bpe"))
    backend.pre_tokenizer, backend.decoder = splitting, decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    )
    backend.train_from_iterator(TEXTS + proof_texts(seed=7), trainer)
    backend.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    backend.save(str(folder / "tokenizer.json"))


QUICK = ("llama-bpe", "gpt-2 as a regex")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n not in QUICK)) for n in SPLITTINGS]
)
def test_ids_are_equal(folder: Path, tmp_path: Path, name: str) -> None:
    train(folder, name)
    ours = tokenizer.Tokenizer.load(folder)
    report = write_gguf(folder, tmp_path / "m.gguf", "q8_0")
    assert report.pre_tokenizer == name.partition(" ")[0]
    texts = proof_texts(
        [*TEXTS, "a<think>b</think> <think>", "<|im_end|><|im_start|>x"], num_random=3000
    )
    with LlamaCpp(tmp_path / "m.gguf", n_ctx=256, threads=1) as model:
        for special in (False, True):
            found = model.tokenize_all(texts, special)
            wrong = [
                text for text, ids in zip(texts, found) if ids != ours.encode(text, special=special)
            ]
            assert wrong == []


def test_loose_accents_are_a_note_and_no_failure(tmp_path: Path) -> None:
    model = save_tiny(tmp_path, "llama", num_hidden_layers=1)
    edit_json(tmp_path / "tokenizer.json", normalizer={"type": "NFC"})
    reference = TorchReference(model, tokenizer.Tokenizer.load(tmp_path))
    write_gguf(tmp_path, tmp_path / "m.gguf", "f32")
    report = verify(tmp_path / "m.gguf", reference, texts=TEXTS, threads=1)
    assert report.ok and report.tokens_equal
    assert "loose accents get other ids: llama.cpp does not compose them" in report.notes[0]
    assert report.num_prompts == 4  # without prompts, the beginnings of the texts


@pytest.mark.parametrize("in_template", [False, True])
def test_bos_stands_once_before_a_chat_or_not_at_all(tmp_path: Path, in_template: bool) -> None:
    model = save_tiny(tmp_path, "llama", num_hidden_layers=1)
    edit_json(tmp_path / "tokenizer_config.json", bos_token="<|endoftext|>", add_bos_token=True)
    if in_template:
        file = tmp_path / "chat_template.jinja"
        file.write_text("{{ bos_token }}" + file.read_text())
    ours = tokenizer.Tokenizer.load(tmp_path)
    write_gguf(tmp_path, tmp_path / "m.gguf", "f32")
    report = verify(
        tmp_path / "m.gguf", TorchReference(model, ours), texts=TEXTS, prompts=PROMPTS, threads=1
    )
    assert report.ok, report.failures
    with LlamaCpp(tmp_path / "m.gguf", n_ctx=256, threads=1) as runtime:
        assert runtime.add_bos is in_template
        chat = runtime.apply_template(PROMPTS[0])
        ids = runtime.tokenize_all([chat], special=True, add_bos=True)[0]
        typed = [{"role": "user", "content": "<|im_start|>x"}]
        assert runtime.encode_prompt(typed) == ours.encode_prompt(typed)
        assert runtime.encode_prompt(PROMPTS[0]) == ids
    assert ids == ours.encode_prompt(PROMPTS[0])
    assert ids.count(ours.bos_id) == int(in_template)


def test_a_model_without_a_template_has_none(tmp_path: Path) -> None:
    model = save_tiny(tmp_path, "llama", num_hidden_layers=1)
    (tmp_path / "chat_template.jinja").unlink()
    raw = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert "chat_template" not in raw
    reference = TorchReference(model, tokenizer.Tokenizer.load(tmp_path))
    write_gguf(tmp_path, tmp_path / "m.gguf", "f16")
    report = verify(tmp_path / "m.gguf", reference, texts=TEXTS, threads=1)
    assert report.ok and report.template_equal is None
