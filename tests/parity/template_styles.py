"""Chat template styles, written from their published formats, each with a small tokenizer."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

from mule.tokenizer import Tokenizer

CORPUS = ["What is the capital of France? It is Paris.\n\n\nI think so, Bob.\n" * 9]


@dataclass(frozen=True)
class Style:
    """A template with its special tokens; `turn_end` ends an answer, `system` says if it is known."""

    name: str
    template: str
    specials: tuple[str, ...]
    eos: str
    turn_end: str
    bos: str | None = None
    system: bool = True


def load(style: Style, template: str | None = None, **changes: object) -> Tokenizer:
    """The style's tokenizer, with another template or other lines of its tokenizer_config.json."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        _backend(style).save(str(folder / "tokenizer.json"))
        config = {"eos_token": style.eos, "chat_template": template or style.template}
        if style.bos:
            config["bos_token"] = style.bos
        (folder / "tokenizer_config.json").write_text(json.dumps(config | changes))
        return Tokenizer.load(folder)


@cache
def clean(style: Style) -> Tokenizer:
    return load(style)


@cache
def _backend(style: Style) -> Backend:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    specials = [AddedToken(text, special=True, normalized=False) for text in style.specials]
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=specials,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    if style.bos:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{style.bos} $A", special_tokens=[(style.bos, backend.token_to_id(style.bos))]
        )
    return backend


_LOOP = "{% for m in messages %}"
_ALTERNATE = (
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}"
    "{% endif %}"
)

CHATML = Style(
    "ChatML",
    _LOOP + "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    eos="<|im_end|>",
    turn_end="<|im_end|>",
)
LLAMA3 = Style(
    "Llama 3",
    "{{ bos_token }}" + _LOOP + "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' "
    "+ m.content | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
    (
        *("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>"),
        "<|eot_id|>",
    ),
    eos="<|eot_id|>",
    turn_end="<|eot_id|>",
    bos="<|begin_of_text|>",
)
GEMMA = Style(
    "Gemma",
    "{{ bos_token }}{% if messages[0].role == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}" + _LOOP + _ALTERNATE + "{{ "
    "'<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content | trim "
    "+ '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
    ("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"),
    eos="<eos>",
    turn_end="<end_of_turn>",
    bos="<bos>",
    system=False,
)
MISTRAL = Style(
    "Mistral",
    "{{ bos_token }}" + _LOOP + _ALTERNATE + "{% if m.role == 'user' %}"
    "{{ '[INST] ' + m.content + ' [/INST]' }}{% else %}{{ ' ' + m.content + eos_token }}{% endif %}"
    "{% endfor %}",
    ("<unk>", "<s>", "</s>", "[INST]", "[/INST]"),
    eos="</s>",
    turn_end="</s>",
    bos="<s>",
    system=False,
)
LLAMA2 = Style(
    "Llama 2",
    "{% set ns = namespace(system='') %}{% if messages[0].role == 'system' %}"
    "{% set ns.system = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}"
    "{% set messages = messages[1:] %}{% endif %}" + _LOOP + "{% if m.role == 'user' %}"
    "{{ bos_token + '[INST] ' + (ns.system if loop.first else '') + m.content.strip() + ' [/INST]' "
    "}}{% else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}",
    ("<unk>", "<s>", "</s>"),
    eos="</s>",
    turn_end="</s>",
    bos="<s>",
)
PHI3 = Style(
    "Phi-3",
    _LOOP + "{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
    ("<|endoftext|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"),
    eos="<|endoftext|>",
    turn_end="<|end|>",
)
PHI4 = Style(
    "Phi-4",
    _LOOP + "{{ '<|im_start|>' + m.role + '<|im_sep|>' + m.content + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}",
    ("<|endoftext|>", "<|im_start|>", "<|im_sep|>", "<|im_end|>"),
    eos="<|im_end|>",
    turn_end="<|im_end|>",
)
# Thinking is shown in the answers after the last question only, and taken out of the others.
QWEN3 = Style(
    "Qwen3 with thinking",
    "{% if tools %}{{ '<|im_start|>system\n' }}{% if messages[0].role == 'system' %}"
    "{{ messages[0].content + '\n\n' }}{% endif %}{{ '# Tools\n<tools>' }}"
    "{% for tool in tools %}{{ '\n' + tool | tojson }}{% endfor %}{{ '\n</tools><|im_end|>\n' }}"
    "{% elif messages[0].role == 'system' %}"
    "{{ '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}{% endif %}"
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}" + _LOOP + "{% if m.role == 'user' %}"
    "{{ '<|im_start|>user\n' + m.content + '<|im_end|>\n' }}{% elif m.role == 'assistant' %}"
    "{% set thought = '' %}{% set words = m.content %}{% if '</think>' in words %}"
    "{% set thought = words.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set words = words.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{{ '<|im_start|>assistant\n' }}{% if loop.index0 > ns.last and (loop.last or thought) %}"
    "{{ '<think>\n' + thought + '\n</think>\n\n' + words.lstrip('\n') }}{% else %}{{ words }}"
    "{% endif %}{% for call in m.tool_calls %}"
    '{{ \'\n<tool_call>\n{"name": "\' + call.function.name + \'", "arguments": \' }}'
    "{{ call.function.arguments | tojson }}{{ '}\n</tool_call>' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% elif m.role == 'tool' %}"
    "{{ '<|im_start|>user\n<tool_response>\n' + m.content + '\n</tool_response><|im_end|>\n' }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    eos="<|im_end|>",
    turn_end="<|im_end|>",
)
ZEPHYR = Style(
    "Zephyr",
    _LOOP + "{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
    ("<unk>", "<s>", "</s>"),
    eos="</s>",
    turn_end="</s>",
)
ALPACA = Style(
    "Alpaca text",
    _LOOP + "{% if m.role == 'system' %}{{ m.content + '\n\n' }}{% elif m.role == 'user' %}"
    "{{ '### Instruction:\n' + m.content + '\n\n### Response:\n' }}{% else %}"
    "{{ m.content + eos_token + '\n\n' }}{% endif %}{% endfor %}",
    ("<|padding|>", "<|endoftext|>"),
    eos="<|endoftext|>",
    turn_end="<|endoftext|>",
)
DEEPSEEK = Style(
    "DeepSeek",
    "{{ bos_token }}" + _LOOP + "{% if m.role == 'system' %}{{ m.content }}"
    "{% elif m.role == 'user' %}{{ '<｜User｜>' + m.content }}{% else %}"
    "{{ '<｜Assistant｜>' + m.content + '<｜end▁of▁sentence｜>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}",
    ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"),
    eos="<｜end▁of▁sentence｜>",
    turn_end="<｜end▁of▁sentence｜>",
    bos="<｜begin▁of▁sentence｜>",
)

STYLES = (*(CHATML, LLAMA3, GEMMA, MISTRAL, LLAMA2, PHI3, PHI4, QWEN3, ZEPHYR, ALPACA, DEEPSEEK),)
