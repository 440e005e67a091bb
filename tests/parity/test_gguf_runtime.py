"""llama.cpp in its child process: the same numbers, and no fault there can harm Mule."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mule.errors import ModelError
from mule.export.gguf import write_gguf
from mule.generate import _libllama
from mule.generate.llamacpp import LlamaCpp, Runtime
from tests.parity.tiny_gguf import PROMPTS, TEXTS, TorchReference, save_tiny, tiny_tokenizer


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TorchReference]:
    folder = tmp_path_factory.mktemp("runtime")
    model = save_tiny(folder, "qwen3", num_hidden_layers=2)
    write_gguf(folder, folder / "m.gguf", "f32")
    return folder / "m.gguf", TorchReference(model, tiny_tokenizer())


@pytest.fixture(scope="module")
def loaded(tiny: tuple[Path, TorchReference]) -> Iterator[LlamaCpp]:
    with LlamaCpp(tiny[0], n_ctx=1024, threads=1, exact=True) as model:
        yield model


def test_logits_are_transformers(loaded: LlamaCpp, tiny: tuple[Path, TorchReference]) -> None:
    ids = (tiny_tokenizer().encode(TEXTS[3]) * 7)[:700]  # more than one batch of 512
    expected = tiny[1].logits(ids)
    found = loaded.logits(ids)
    assert found.shape == (700, 619) and found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=5e-5)


def test_threads_are_chosen_by_trial(tiny: tuple[Path, TorchReference]) -> None:
    ids = tiny_tokenizer().encode(TEXTS[0])
    with LlamaCpp(tiny[0], n_ctx=256, exact=True) as model:
        np.testing.assert_allclose(model.logits(ids), tiny[1].logits(ids), atol=5e-5)


def test_facts_about_the_file(loaded: LlamaCpp) -> None:
    tokenizer = tiny_tokenizer()
    assert loaded.eos_id == tokenizer.eos_id
    assert loaded.stop_ids == set(tokenizer.stop_ids)
    assert loaded.is_eog(tokenizer.eos_id) and not loaded.is_eog(300)
    assert loaded.num_tokens == 619 and loaded.vocab_size == tokenizer.vocab_size
    assert loaded.n_ctx_train == 1024
    assert loaded.chat_template == tokenizer.chat_template


def test_pieces_are_the_tokenizers_bytes(loaded: LlamaCpp) -> None:
    tokenizer = tiny_tokenizer()
    for token in range(tokenizer.vocab_size):
        assert loaded.token_piece(token) == tokenizer.token_bytes(token)
    assert loaded.tokenize("a<|im_end|>", special=True)[-1] == tokenizer.eos_id
    assert tokenizer.eos_id not in loaded.tokenize("a<|im_end|>", special=False)


def test_template_is_rendered_as_the_model_was_taught(loaded: LlamaCpp) -> None:
    for messages in PROMPTS:
        expected = tiny_tokenizer().render_chat(messages, add_generation_prompt=True)
        assert loaded.apply_template(messages) == expected


def test_prompts_are_the_tokenizers_even_with_typed_control_tokens(loaded: LlamaCpp) -> None:
    typed = [{"role": "user", "content": "a<|im_end|>\n<|im_start|>system\nb <|pad|>\ue000"}]
    for messages in (*PROMPTS, typed):
        assert loaded.encode_prompt(messages) == tiny_tokenizer().encode_prompt(messages)


def test_the_context_is_the_models_own_by_default(tiny: tuple[Path, TorchReference]) -> None:
    with LlamaCpp(tiny[0], threads=1) as model:
        assert model.n_ctx == model.n_ctx_train == 1024


# ---------------------------------------------------------------- generating


def test_greedy_is_the_references(loaded: LlamaCpp, tiny: tuple[Path, TorchReference]) -> None:
    for messages in (*PROMPTS, PROMPTS[0]):  # the last time from the cache of another chat
        ids = tiny_tokenizer().encode_prompt(messages)
        assert list(loaded.generate(ids, max_tokens=24)) == tiny[1].greedy(ids, 24)
        assert loaded.reason == "length"


def test_generation_stops_at_a_stop_token(loaded: LlamaCpp) -> None:
    ids = tiny_tokenizer().encode_prompt(PROMPTS[0])
    free = list(loaded.generate(ids, max_tokens=9))
    stop = free[4]
    found = list(loaded.generate(ids, max_tokens=9, stop_ids=[stop]))
    assert found == free[: free.index(stop)]
    assert (loaded.reason, loaded.stop_id) == ("stop", stop)


def test_generation_ends_where_the_context_does(tiny: tuple[Path, TorchReference]) -> None:
    with LlamaCpp(tiny[0], n_ctx=256, threads=1) as model:
        assert model.n_ctx == 256
        assert len(list(model.generate([5] * 250, max_tokens=99))) == 7
        assert model.reason == "context"
        with pytest.raises(ModelError, match="257 tokens, and the context holds 256"):
            model.logits([5] * 257)
        with pytest.raises(ModelError, match=r"a token id outside 0\.\.618"):
            model.logits([619])


def test_sampling_follows_its_seed_and_its_limits(loaded: LlamaCpp) -> None:
    ids = tiny_tokenizer().encode_prompt(PROMPTS[0])

    def draw(**options: Any) -> list[int]:
        return list(loaded.generate(ids, max_tokens=12, temperature=1.5, **options))

    assert draw(seed=1) == draw(seed=1)
    assert draw(seed=1) != draw(seed=2)
    greedy = list(loaded.generate(ids, max_tokens=12))
    assert draw(top_k=1, seed=3) == draw(top_p=1e-9, seed=4) == draw(min_p=0.999, seed=5) == greedy
    assert max(draw(seed=6)) < loaded.vocab_size
    unlike = list(loaded.generate(ids, max_tokens=12, repeat_penalty=10.0))
    assert len(set(unlike)) == 12 and not set(unlike) & set(ids)


def test_sampling_draws_from_the_distribution(loaded: LlamaCpp) -> None:
    ids = tiny_tokenizer().encode(TEXTS[0])
    row = loaded.logits(ids)[-1, : loaded.vocab_size].astype(np.float64) / 0.3
    top = np.argsort(-row)[:3]
    share = np.exp(row[top] - row[top[0]])
    share /= share.sum()
    drawn = [
        next(iter(loaded.generate(ids, max_tokens=1, temperature=0.3, top_k=3, seed=seed)))
        for seed in range(400)
    ]
    counts = np.array([drawn.count(int(token)) for token in top])
    assert counts.sum() == 400
    assert (np.abs(counts / 400 - share) < 4 * np.sqrt(share * (1 - share) / 400) + 1e-3).all()


def test_an_abandoned_generation_disturbs_nothing(loaded: LlamaCpp) -> None:
    ids = tiny_tokenizer().encode_prompt(PROMPTS[0])
    expected = list(loaded.generate(ids, max_tokens=6))
    for _ in loaded.generate(ids, max_tokens=50):
        break
    assert list(loaded.generate(ids, max_tokens=6)) == expected


def test_ctrl_c_leaves_the_conversation_whole(tiny: tuple[Path, TorchReference]) -> None:
    ids = tiny_tokenizer().encode(TEXTS[3])[:99]
    with LlamaCpp(tiny[0], n_ctx=256, threads=1) as model:
        expected = [model.logits(ids[:length]) for length in (9, 50)]
        old = signal.signal(signal.SIGALRM, _interrupt)
        try:
            for number in range(12):
                signal.setitimer(signal.ITIMER_REAL, 0.0007 * (number + 1))
                with pytest.raises(KeyboardInterrupt):
                    for _ in range(10_000):
                        model.logits(ids)
                if model._torn:  # the rare moment in the middle of a message: refused afterwards
                    return
                np.testing.assert_array_equal(model.logits(ids[:9]), expected[0])
                np.testing.assert_array_equal(model.logits(ids[:50]), expected[1])
        finally:
            signal.signal(signal.SIGALRM, old)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


# ---------------------------------------------------------------- faults


def test_a_crash_of_the_child_is_an_error_here(tiny: tuple[Path, TorchReference]) -> None:
    with LlamaCpp(tiny[0], n_ctx=256, threads=1) as model:
        os.kill(model._process.pid, signal.SIGABRT)
        with pytest.raises(ModelError) as error:
            model.logits([5, 6])
        assert f"{tiny[0]}: llama.cpp crashed (SIGABRT)" in error.value.message
        with pytest.raises(ModelError, match=r"llama\.cpp has ended"):
            model.logits([5, 6])


def test_an_assertion_inside_llama_cpp_is_an_error_with_its_words() -> None:
    with Runtime("quantising") as runtime, pytest.raises(ModelError) as error:
        runtime.request("quantize", bytes(1), type_id=12, rows=1, columns=1, row_bytes=1)
    assert error.value.message.startswith("quantising: ")


def test_a_file_of_impossible_numbers_is_an_error(
    tiny: tuple[Path, TorchReference], tmp_path: Path
) -> None:
    content = bytearray(tiny[0].read_bytes())
    key = b"qwen3.attention.head_count"
    place = content.index(key) + len(key) + 4
    content[place : place + 4] = (0).to_bytes(4, "little")
    file = tmp_path / "zero-heads.gguf"
    file.write_bytes(content)
    with pytest.raises(ModelError, match=r"zero-heads\.gguf: llama\.cpp c"):
        LlamaCpp(file, n_ctx=256, threads=1)


def test_a_cut_file_never_reaches_llama_cpp(
    tiny: tuple[Path, TorchReference], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "cut.gguf"
    file.write_bytes(tiny[0].read_bytes()[:-5000])
    monkeypatch.setattr("subprocess.Popen", None)
    with pytest.raises(ModelError, match=r"cut\.gguf: cut short"):
        LlamaCpp(file)


def test_another_build_of_llama_cpp_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda name: "2026.1.1")
    with pytest.raises(_libllama.LibraryError, match=r"xllamacpp is 2026\.1\.1; Mule knows"):
        _libllama.load_library()


def test_the_child_sees_no_secrets_and_leaves_nothing(
    tiny: tuple[Path, TorchReference], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with LlamaCpp(tiny[0], n_ctx=256, threads=1) as model:
        model.apply_template(PROMPTS[0])
        environment = Path(f"/proc/{model._process.pid}/environ")
        if environment.exists():
            assert b"hf_secret" not in environment.read_bytes()
        process = model._process
    assert process.returncode == 0
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_the_same_name_cannot_slip_in_code(
    tiny: tuple[Path, TorchReference], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("numpy", "json", "xllamacpp"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit(9)")
    monkeypatch.chdir(tmp_path)
    with LlamaCpp(tiny[0], n_ctx=256, threads=1) as model:
        assert model.logits([7]).shape == (1, 619)
    shutil.rmtree(tmp_path)
