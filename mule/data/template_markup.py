"""Markup a chat template writes that its tokenizer does not know: a template of another model."""

from __future__ import annotations

import re
from collections.abc import Sequence

from mule.data.sources.items import Message
from mule.errors import ModelError
from mule.tokenizer import Tokenizer

_MARKUP = re.compile(
    r"<\|[^<>|\s]{1,40}\|>"  # ChatML, Llama 3, Phi
    r"|<｜[^<>｜\s]{1,40}｜>"  # DeepSeek
    r"|</?(?:s|bos|eos|(?:start|end)_of_turn)>"  # Llama 2, Gemma
    r"|\[/?(?:INST|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS)\]"  # Mistral
)
# Zephyr, TinyLlama, Tulu and others write roles as plain text and end a turn with eos_token.
_PLAIN_ROLES = re.compile(r"<\|(?:user|assistant|system|prompter|prompt|answer|human|bot|tool)\|>")
# Plain text in Llama 2 and in the first Mistral models, whose tokenizers have these two.
_PLAIN_INST = ("[INST]", "[/INST]")
_LLAMA_ENDS = ("<s>", "</s>")


def check_markup(tokenizer: Tokenizer, messages: Sequence[Message]) -> None:
    """Raises ModelError for markup around `messages` that is not one token, unless it is of a
    published style that writes it as plain text."""
    chat = [message.as_dict() for message in messages]
    for prompts in (False, True):
        text = tokenizer.render_chat(chat[: -1 if prompts else None], add_generation_prompt=prompts)
        for found in sorted(set(_MARKUP.findall(text))):
            if len(tokenizer.encode(found, special=True)) > 1 and not _is_plain(tokenizer, found):
                raise ModelError(
                    f"the chat template writes {found}, which is not a token of this tokenizer: "
                    "it is the template of another model",
                    "use the chat_template.jinja that came with this tokenizer, "
                    "or add the token to both tokenizer and model",
                )


def _is_plain(tokenizer: Tokenizer, markup: str) -> bool:
    if markup in _PLAIN_INST:
        return all(len(tokenizer.encode(end, special=True)) == 1 for end in _LLAMA_ENDS)
    return _PLAIN_ROLES.fullmatch(markup) is not None
