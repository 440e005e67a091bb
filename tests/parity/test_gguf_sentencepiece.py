"""A tokenizer made by SentencePiece gets the same ids in llama.cpp."""

from __future__ import annotations

from pathlib import Path

import pytest

from mule.export.gguf import write_gguf
from mule.export.proof import proof_texts
from mule.generate.llamacpp import LlamaCpp
from mule.tokenizer import Tokenizer
from tests.parity.sentencepiece_kinds import KINDS, write
from tests.parity.tiny_gguf import PROMPTS, TEXTS, save_tiny

CHATS = [PROMPTS[0], [PROMPTS[1][1]], [{"role": "user", "content": "  two  spaces\n\n\nand "}]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pieces")
    save_tiny(path, "llama", num_hidden_layers=1, vocab_size=1031)
    return path


def sent(model: LlamaCpp, name: str, text: str, special: bool) -> str:
    """What llama.cpp must get for the ids of `text`: Mistral v0.3 begins a text with a space, if it
    has none, which llama.cpp does nowhere or after every special token."""
    begins = text.startswith(" ") or (special and model._control_pattern.match(text))
    return text if name != "Mistral v0.3" or begins else f" {text}"


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n != "Mistral v0.3")) for n in KINDS]
)
def test_ids_are_equal_on_three_thousand_texts(folder: Path, tmp_path: Path, name: str) -> None:
    kind = KINDS[name]
    write(kind, folder)
    ours = Tokenizer.load(folder)
    report = write_gguf(folder, tmp_path / "m.gguf", "q8_0")
    assert report.pre_tokenizer == "default"
    specials = "".join(kind.style.specials)
    texts = proof_texts([*TEXTS, specials, f"a{specials} b", f"\n{specials}\n c"], num_random=3000)
    with LlamaCpp(tmp_path / "m.gguf", n_ctx=256, threads=1) as model:
        for special in (False, True):
            if name == "Llama 2, saved again":  # llama.cpp puts a second space before a space
                texts = [model.without_leading_spaces(text, special) for text in texts]
            found = model.tokenize_all([sent(model, name, t, special) for t in texts], special)
            wrong = [
                text for text, ids in zip(texts, found) if ids != ours.encode(text, special=special)
            ]
            assert wrong == []
        typed = f"a {specials} <unk> b {kind.style.eos}"
        assert not {ours.eos_id, *ours.stop_ids} & set(model.tokenize(typed, special=False))
        for chat in [*CHATS, [{"role": "user", "content": typed}]]:
            assert model.encode_prompt(chat) == ours.encode_prompt(chat)
        for chat in CHATS:
            rendered = ours.render_chat(chat, add_generation_prompt=True)
            found = model.tokenize_all([model.apply_template(chat)], special=True, add_bos=True)
            assert found[0] == ours.encode(rendered, special=True)
