"""Tokenizer: round trips, special tokens as text and as tokens, chat templates, files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from mule import progress
from mule.errors import ModelError, UserError
from mule.tokenizer import StreamDecoder, Tokenizer
from mule.tokenizer.template import MAX_TEMPLATE_BYTES, ChatTemplate
from mule.tokenizer.training_text import training_pieces

CORPUS = [
    "The capital of France is Paris. What is the capital of Spain? It is Madrid.\n" * 9,
    "Où est la bibliothèque ? Elle est à côté de l'église, près du marché.\n" * 7,
    "def add(a, b):\n    return a + b\n\n\nprint(add(12, 345))\n" * 5,
]
TRICKY = [
    "",
    " ",
    "a  b   c    d",
    "\n\n\n\ttabs\t\tand  \r\n lines \n",
    "0 1 12 123 1234567890 3.14159 -7e-3",
    "👩‍👩‍👧‍👦 🏴‍☠️ 😀😀 🇫🇷",
    "L'été à Besançon, où naît l'œuvre: «ça, là-bas»…",
    "日本語 العربية हिन्दी ไทย ‮rtl‬ zero​width",
    "e\u0301 vs é, ﬁ, K, \x00\x01\x7f, \ufffd, \U0010ffff",
]
CHAT = [
    {"role": "system", "content": "You are Bob."},
    {"role": "user", "content": "  What is the capital of France?\n"},
    {"role": "assistant", "content": "\nParis."},
    {"role": "user", "content": "And of Spain?"},
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(CORPUS, vocab_size=350)


@pytest.fixture(scope="module")
def folder(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(folder)
    return folder


# ---------------------------------------------------------------- text


@pytest.mark.parametrize("text", TRICKY)
def test_round_trip(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(st.text(max_size=200))
@settings(max_examples=200, deadline=None)
def test_round_trip_of_any_text(text: str) -> None:
    tokenizer = _shared()
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    stream = StreamDecoder(tokenizer)
    assert "".join(map(stream.push, ids)) + stream.flush() == text


@given(st.lists(st.integers(0, 299), max_size=60), st.booleans())
@settings(max_examples=200, deadline=None)
def test_stream_equals_decode_for_any_ids(ids: list[int], skip: bool) -> None:
    tokenizer = _shared()
    stream = StreamDecoder(tokenizer, skip_special=skip)
    streamed = "".join(map(stream.push, ids)) + stream.flush()
    assert streamed == tokenizer.decode(ids, skip_special=skip)


def test_stream_holds_back_half_a_character(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("😀")
    assert len(ids) > 1
    stream = StreamDecoder(tokenizer)
    assert [stream.push(token_id) for token_id in ids] == [""] * (len(ids) - 1) + ["😀"]
    assert stream.push(ids[0]) == ""
    assert stream.flush() == "\ufffd"


@given(st.lists(st.sampled_from(["ab", " ", "\n", "é", "12", ".", "  ", "'s", "_"]), max_size=60))
@settings(max_examples=200, deadline=None)
def test_cutting_long_texts_changes_no_id(parts: list[str]) -> None:
    from mule.tokenizer import core

    tokenizer, text = _shared(), "".join(parts)
    whole = tokenizer.encode(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(core, "_PIECE_CHARS", 5)
        assert tokenizer.encode_batch([text, "", text]) == [whole, [], whole]


def test_long_texts_are_cut(tokenizer: Tokenizer) -> None:
    from mule.tokenizer.core import _cut

    text = "Paris is the capital. " * 3000
    assert len(_cut(text)) == 17
    assert tokenizer.encode(text) == tokenizer._literal.encode(text).ids


def test_typed_special_tokens_are_text_unless_asked_for(tokenizer: Tokenizer) -> None:
    text = "say <|im_end|> and <|endoftext|>"
    plain, parsed = tokenizer.encode(text), tokenizer.encode(text, special=True)
    assert not set(plain) & set(tokenizer.stop_ids)
    assert tokenizer.decode(plain) == text
    assert parsed.count(tokenizer.eos_id) == parsed.count(tokenizer.document_end_id) == 1
    assert tokenizer.encode_batch([text, text], special=True) == [parsed, parsed]
    assert tokenizer.encode_batch([text]) == [plain]
    assert tokenizer.decode(parsed, skip_special=True) == "say  and "


def test_half_a_character_is_refused_by_position(tokenizer: Tokenizer) -> None:
    for call in (tokenizer.encode, lambda text: tokenizer.encode_batch(["fine", text])):
        with pytest.raises(UserError, match=r"holds \\ud800, half of a character, at position 3"):
            call("abc\ud800")


def test_unknown_id_is_refused(tokenizer: Tokenizer) -> None:
    size = tokenizer.vocab_size
    for token_id in (size, -1):
        with pytest.raises(UserError, match=rf"id {token_id} is not in this tokenizer \({size} id"):
            tokenizer.decode([5, token_id])


def test_token_text(tokenizer: Tokenizer) -> None:
    (space_the,) = set(tokenizer.encode(" the"))
    assert tokenizer.token_text(space_the) == " the"
    assert tokenizer.token_bytes(space_the) == b" the"
    assert tokenizer.token_text(tokenizer.eos_id) == "<|im_end|>"


# ---------------------------------------------------------------- training


def test_training_gives_specials_and_every_byte(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == 350
    assert tokenizer.bos_id is None
    assert tokenizer.token_text(tokenizer.document_end_id) == "<|endoftext|>"
    assert tokenizer.stop_ids == (tokenizer.eos_id, tokenizer.document_end_id)
    assert tokenizer.pad_id not in (None, *tokenizer.stop_ids)
    assert {tokenizer.token_bytes(i) for i in range(350)} >= {bytes([b]) for b in range(256)}


def test_training_twice_gives_the_same_tokenizer(tokenizer: Tokenizer) -> None:
    assert Tokenizer.train(iter(CORPUS), 350, num_texts=3).fingerprint() == tokenizer.fingerprint()
    assert Tokenizer.train(CORPUS[:1], 300).fingerprint() != tokenizer.fingerprint()


@pytest.mark.timeout(60)
@pytest.mark.parametrize("blob", ["ab" * 500_000, " " * 1_000_000, "\u4f60\u597d" * 500_000])
def test_a_megabyte_without_a_space_does_not_take_hours(blob: str) -> None:
    trained = Tokenizer.train([*CORPUS, f"before {blob} after"], 350)
    assert trained.decode(trained.encode(f"x {blob[:3000]} y")) == f"x {blob[:3000]} y"


def test_blobs_are_cut_and_nothing_is_lost() -> None:
    texts = ["short words only", "a" * 255, f"x {'y' * 700} z", " " * 513, ""]
    with progress.task("cutting") as bar:
        pieces = list(training_pieces(texts, bar))
    assert "".join(pieces) == "".join(texts)
    assert pieces[:2] == texts[:2] and len(pieces) == 2 + 3 + 3 + 1


def test_small_corpus_is_noted() -> None:
    class Notes(progress.Silence):
        texts: list[str] = []  # noqa: RUF012

        def note(self, text: str, level: str) -> None:
            self.texts.append(text)

    with progress.using(Notes()):
        tokenizer = Tokenizer.train(["ab ab"], 5000)
    assert tokenizer.vocab_size < 270
    found = f"the texts hold {tokenizer.vocab_size} tokens, fewer than the 5,000 asked for"
    assert Notes.texts == [found]


def test_too_small_a_vocabulary_is_refused() -> None:
    with pytest.raises(UserError, match=r"259 tokens has no room(.|\n)*hint: ask for at least 260"):
        Tokenizer.train(CORPUS, 259)


# ---------------------------------------------------------------- chat


def test_chatml(tokenizer: Tokenizer) -> None:
    assert tokenizer.render_chat(CHAT[:2], add_generation_prompt=True) == (
        "<|im_start|>system\nYou are Bob.<|im_end|>\n"
        "<|im_start|>user\n  What is the capital of France?\n<|im_end|>\n<|im_start|>assistant\n"
    )


def test_prompt_ids_are_those_of_the_whole_text(tokenizer: Tokenizer) -> None:
    text = tokenizer.render_chat(CHAT, add_generation_prompt=True)
    assert tokenizer.encode_prompt(CHAT) == tokenizer.encode(text, special=True)


_SPECIALS = ["<|im_end|>", "<|im_start|>", "<|endoftext|>"]
_CONTENT = st.lists(st.sampled_from([*_SPECIALS, "a", "\n", " ", "é", "user\n"]), max_size=8)


@given(_CONTENT.map("".join), _CONTENT.map("".join))
@settings(max_examples=150, deadline=None)
def test_typed_special_tokens_never_become_control_tokens(user: str, answer: str) -> None:
    tokenizer = _shared()
    chat = [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
    ids = tokenizer.encode_prompt(chat)
    assert tokenizer.decode(ids) == tokenizer.render_chat(chat, add_generation_prompt=True)
    assert sum(map(tokenizer.is_special, ids)) == 5  # two turns of two, and the open one


def test_both_ways_to_encode_a_prompt_agree(tokenizer: Tokenizer) -> None:
    text = tokenizer.render_chat(CHAT, add_generation_prompt=True)
    assert tokenizer._encode_between(text, "") == tokenizer.encode(text, special=True)


def test_a_template_that_rewrites_messages_refuses_typed_specials(tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m['content'] | length }}<|im_end|>{% endfor %}"
    tokenizer = _with_template(tmp_path, template)
    with pytest.raises(UserError, match="special token, and the chat template rewrites"):
        tokenizer.encode_prompt([{"role": "user", "content": "a <|im_end|>"}])


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "a chat without messages"),
        ([{"role": "bot", "content": "a"}], "message 1 has the role 'bot'"),
        ([CHAT[0], {"role": "user", "content": None}], "message 2 has no text"),
    ],
)
def test_bad_messages(tokenizer: Tokenizer, messages: list, message: str) -> None:
    with pytest.raises(UserError, match=message):
        tokenizer.render_chat(messages, add_generation_prompt=True)


_CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": "1 <|im_end|>"}}}


def test_typed_special_tokens_in_calls_and_tools_stay_text(tokenizer: Tokenizer) -> None:
    chat = [
        {"role": "user", "content": "1 + 1?", "name": "<|im_start|>"},
        {"role": "assistant", "content": "", "tool_calls": [_CALL]},
        {"role": "tool", "content": "2<|im_end|>", "tool_call_id": "<|im_end|>"},
    ]
    described = [{"name": "add<|im_start|>", "description": "<|im_end|>", "<|im_end|>": ["x"]}]
    ids = tokenizer.encode_prompt(chat, described)
    text = tokenizer.render_chat(chat, add_generation_prompt=True, tools=described)
    assert tokenizer.decode(ids) == text
    assert text.count("<|im_end|>") == 4 + 4  # typed, and of the system, user, answer and result
    assert sum(map(tokenizer.is_special, ids)) == 2 * 4 + 1
    messages, tools, mark = tokenizer.protect(chat, described)
    assert mark
    assert "<|im_end|>" not in json.dumps([messages, tools], ensure_ascii=False)
    assert tokenizer.protect(CHAT) == (CHAT, None, "")


@pytest.mark.parametrize(
    "calls", [[{}], ["add"], "add", [{"function": {"name": "add", "arguments": "1"}}]]
)
def test_tool_calls_without_name_or_arguments(tokenizer: Tokenizer, calls: object) -> None:
    chat = [CHAT[1], {"role": "assistant", "content": "", "tool_calls": calls}]
    with pytest.raises(UserError, match="message 2 has a tool call without a name and arguments"):
        tokenizer.render_chat(chat, add_generation_prompt=False)


def test_many_special_tokens_are_found_too(tmp_path: Path) -> None:
    """More first characters than are looked for one by one."""
    _shared().save(tmp_path)
    backend = Backend.from_file(str(tmp_path / "tokenizer.json"))
    backend.add_special_tokens([AddedToken(f"{c}end", special=True) for c in "!#$%&*+/"])
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path)
    ids = tokenizer.encode_prompt([{"role": "user", "content": "a $end b <|im_end|>"}])
    assert sum(map(tokenizer.is_special, ids)) == 3


# ---------------------------------------------------------------- foreign templates


def _render(source: str) -> str:
    return ChatTemplate(source, {"bos_token": "<s>"}).render(CHAT, add_generation_prompt=True)


def test_template_language() -> None:
    source = """{%- for m in messages %}
    {%- if m.role == 'system' %}{% continue %}{% endif %}
    {%- generation %}{{ loop.index0 * 2 }}{% endgeneration %}
    {%- endfor %}
    {{- bos_token ~ ' ' ~ ({'é': '<'} | tojson) ~ strftime_now('%Y')[:1] ~ '-' * 3 -}}
    {%- for i in range(2) %}{{ i % 2 }}{% endfor %}"""
    assert _render(source) == '246<s> {"é": "<"}2---01'


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{% for a in range(99999) %}x{% endfor %}", r"its range\(\) loops exceed 10,000 steps"),
        ("{% for a in range(999) %}{% for b in range(999) %}{% endfor %}{% endfor %}", "10,000"),
        ("{{ 'a' * 3000000000 }}", "repeats a string or list too often"),
        ("{{ 3000000000 * [1] }}", "repeats a string or list too often"),
        ("{{ 9 ** 999999999 }}", r"operator \*\* is not allowed"),
        ("{{ '%9999999999d' % 1 }}", "operator % is not allowed"),
        ("{{ 'a'.ljust(9999999999) }}", "is unsafe"),
        ("{{ ''.__class__.__mro__ }}", "is unsafe"),
        ("{{ messages.append(1) }}", "attribute 'append' of 'list' object is unsafe"),
        ("{% for a in range(9999) %}{{ '0' * 999 }}{% endfor %}", "exceeds 1,048,576 characters"),
        ("{{ raise_exception('no system role') }}", "cannot render this conversation: no system"),
        ("{{ messages[0]['content'] + 1 }}", "cannot render this conversation: can only concat"),
    ],
)
def test_hostile_or_failing_templates_are_stopped(source: str, reason: str) -> None:
    with pytest.raises(ModelError, match=reason):
        _render(source)


def test_unreadable_templates() -> None:
    with pytest.raises(ModelError, match=r"not valid Jinja: .*endfor"):
        ChatTemplate("{% for a in messages %}", {})
    with pytest.raises(ModelError, match="has 65,537 bytes; at most 65,536 are read"):
        ChatTemplate("a" * (MAX_TEMPLATE_BYTES + 1), {})


# ---------------------------------------------------------------- files


def test_save_and_load(tokenizer: Tokenizer, folder: Path) -> None:
    for path in (folder, str(folder)):
        loaded = Tokenizer.load(path)
        assert loaded.fingerprint() == tokenizer.fingerprint()
        assert loaded.encode_prompt(CHAT) == tokenizer.encode_prompt(CHAT)
        for name in ("vocab_size", "bos_id", "eos_id", "document_end_id", "stop_ids", "pad_id"):
            assert getattr(loaded, name) == getattr(tokenizer, name), name


@pytest.mark.parametrize("model_type", [None, "llama", "qwen3"])
def test_transformers_agrees(
    tokenizer: Tokenizer, folder: Path, tmp_path: Path, model_type: str | None
) -> None:
    transformers = pytest.importorskip("transformers")
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    if model_type:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in (*TRICKY, *CORPUS, "typed <|im_end|>"):
        assert theirs(text)["input_ids"] == tokenizer.encode(text, special=True)
    for prompt in (True, False):
        text = theirs.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=prompt)
        assert text == tokenizer.render_chat(CHAT, add_generation_prompt=prompt)
    ids = theirs.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False)
    assert ids == tokenizer.encode_prompt(CHAT)
    assert (theirs.eos_token_id, theirs.pad_token_id) == (tokenizer.eos_id, tokenizer.pad_id)


def test_saved_again_by_transformers(tokenizer: Tokenizer, folder: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert loaded.encode_prompt(CHAT) == tokenizer.encode_prompt(CHAT)
    assert loaded.stop_ids == tokenizer.stop_ids


def test_gpt2_files(tokenizer: Tokenizer, tmp_path: Path) -> None:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    from tokenizers.trainers import BpeTrainer

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend.train_from_iterator(
        CORPUS,
        BpeTrainer(vocab_size=340, initial_alphabet=alphabet, special_tokens=["<|endoftext|>"]),
    )
    backend.model.save(str(tmp_path))
    loaded = Tokenizer.load(tmp_path)
    assert loaded.vocab_size == 340
    assert loaded.eos_id == loaded.document_end_id == 0
    for text in TRICKY:
        assert loaded.encode(text) == backend.encode(text).ids
        assert loaded.decode(loaded.encode(text)) == text
    assert loaded.encode("a<|endoftext|>", special=True)[-1] == 0
    assert loaded.chat_template is None
    with pytest.raises(
        ModelError, match=r"no chat template(.|\n)*put a chat_template.jinja beside"
    ):
        loaded.encode_prompt(CHAT)

    (tmp_path / "vocab.json").rename(tmp_path / "encoder.json")
    (tmp_path / "merges.txt").rename(tmp_path / "vocab.bpe")
    assert Tokenizer.load(tmp_path).encode(CORPUS[0]) == loaded.encode(CORPUS[0])

    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "Qwen2Tokenizer"}')
    with pytest.raises(ModelError, match="Qwen2Tokenizer splits text by other rules than GPT-2"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "vocab.bpe").write_text("#version: 0.2\na b\nbroken\n")
    with pytest.raises(ModelError, match=r"vocab.bpe:3: not a merge"):
        Tokenizer.load(tmp_path)
    (tmp_path / "vocab.bpe").write_text("#version: 0.2\nnowhere found\n")
    with pytest.raises(ModelError, match=r"vocab.bpe: does not fit encoder.json"):
        Tokenizer.load(tmp_path)


def test_names_of_a_foreign_tokenizer(folder: Path, tmp_path: Path) -> None:
    """BOS from the post-processor, the turn's end from the template, stops from generation."""
    backend = Backend.from_file(str(folder / "tokenizer.json"))
    added = ["<s>", "</s>", "<end_of_turn>", "<also>"]
    backend.add_special_tokens([AddedToken(text, special=True) for text in added])
    bos, eos, turn_end, also = (backend.token_to_id(text) for text in added)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", bos)]
    )
    backend.enable_truncation(4)
    backend.save(str(tmp_path / "tokenizer.json"))
    config = {
        "bos_token": {"content": "<s>", "__type": "AddedToken"},
        "eos_token": "</s>",
        "chat_template": [
            {"name": "tool_use", "template": "no"},
            {
                "name": "default",
                "template": "{{ bos_token }}{% for m in messages %}{{ m['content'] }}"
                "<end_of_turn>{{ eos_token }}{% endfor %}",
            },
        ],
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [also, eos]}))
    loaded = Tokenizer.load(tmp_path)
    assert loaded.bos_id == bos
    assert loaded.eos_id == turn_end
    assert loaded.stop_ids == (turn_end, eos, loaded.document_end_id, also)
    assert len(loaded.encode("a b c d e f")) > 4  # truncation in the file does not apply
    assert loaded.encode_prompt(CHAT).count(bos) == 1
    config["add_bos_token"] = False
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert Tokenizer.load(tmp_path).bos_id is None


def test_a_tokenizer_that_is_not_byte_level(tmp_path: Path) -> None:
    vocab = {"<s>": 0, "</s>": 1, "\u2581a": 2, "b": 3, "\u2581": 4}
    vocab |= {f"<0x{byte:02X}>": 5 + byte for byte in range(256)}
    backend = Backend(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    backend.add_special_tokens(["<s>", "</s>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    loaded = Tokenizer.load(tmp_path / "tokenizer.json")
    assert loaded.token_bytes(3) is None
    assert loaded.eos_id == 1
    ids = loaded.encode("b é😀")
    stream = StreamDecoder(loaded)
    pushed = [stream.push(token_id) for token_id in ids]
    assert "".join(pushed) == loaded.decode(ids) == " b é😀"
    assert pushed.count("") == 4  # the first byte of é, and three of the emoji


def test_unreadable_tokenizers_name_file_and_remedy(folder: Path, tmp_path: Path) -> None:
    text = (folder / "tokenizer.json").read_text(encoding="utf-8")
    file = tmp_path / "tokenizer.json"
    for content in (text[: len(text) // 2], "", "[1]", text.replace('"BPE"', '"XYZ"')):
        file.write_text(content, encoding="utf-8")
        with pytest.raises(
            ModelError, match=r"tokenizer.json: cut off or not a(.|\n)*copy it again"
        ):
            Tokenizer.load(tmp_path)
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ModelError, match=r"tokenizer.json: not UTF-8 text"):
        Tokenizer.load(tmp_path)
    file.unlink()
    with pytest.raises(ModelError, match=r"no tokenizer.json in this folder(.|\n)*save_pretrained"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"\n")
    with pytest.raises(ModelError, match=r"a SentencePiece model, which Mule does not read"):
        Tokenizer.load(tmp_path)
    with pytest.raises(ModelError, match=r"nowhere: no such tokenizer"):
        Tokenizer.load(tmp_path / "nowhere")


def test_broken_files_beside_it(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    config = tmp_path / "tokenizer_config.json"
    config.write_text("[1, 2]")
    with pytest.raises(ModelError, match=r"tokenizer_config.json: holds \[1, 2\], not a JSON obj"):
        Tokenizer.load(tmp_path)
    config.write_text('{"a": ')
    with pytest.raises(ModelError, match=r"tokenizer_config.json: not valid JSON"):
        Tokenizer.load(tmp_path)
    config.unlink()
    (tmp_path / "special_tokens_map.json").unlink()
    (tmp_path / "chat_template.jinja").write_text("{{ nothing", encoding="utf-8")
    with pytest.raises(ModelError, match="the chat template is not valid Jinja"):
        Tokenizer.load(tmp_path).encode_prompt(CHAT)


def test_no_end_token_is_refused(tmp_path: Path) -> None:
    backend = Backend(models.BPE(vocab={"a": 0, "b": 1}, merges=[]))
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ModelError, match=r"names no token that ends a text(.|\n)*\"eos_token\""):
        Tokenizer.load(tmp_path)


# ---------------------------------------------------------------- inside


def _with_template(folder: Path, template: str) -> Tokenizer:
    _shared().save(folder)
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return Tokenizer.load(folder)


_cached: list[Tokenizer] = []


def _shared() -> Tokenizer:
    """One tokenizer for the hypothesis tests, which cannot use fixtures of a smaller scope."""
    if not _cached:
        _cached.append(Tokenizer.train(CORPUS, vocab_size=300))
    return _cached[0]
