"""A small sample of held-out data that stays with a run, to verify what is made from it."""

from __future__ import annotations

from typing import Any

from mule.config.schema import DataSection
from mule.data.hold_out import split_held_out
from mule.data.prepare import valid_files
from mule.data.sources import Conversation, Document, read
from mule.tokenizer import Tokenizer

_MAX_TEXTS = 16
_MAX_PROMPTS = 12
_MAX_CHARS = 2000


def held_out_sample(data: DataSection, seed: int, tokenizer: Tokenizer) -> dict[str, Any]:
    """`texts` for logits and perplexity, `prompts` (chats ending with the user) for answers.

    Chats become texts as they are trained, with their special tokens: `rendered` says so.
    From the validation rows; a run without validation gives training rows.
    """
    files = data.valid or valid_files(data.train)
    items: list[Document | Conversation] = list(read(files or data.train, data.format))
    if not files and data.valid_share > 0:
        items = list(split_held_out(items, data.valid_share, seed)[1])
    chosen = items[:: max(1, len(items) // _MAX_TEXTS)][:_MAX_TEXTS]
    texts, prompts = [], []
    for item in chosen:
        if isinstance(item, Document):
            texts.append(item.text[:_MAX_CHARS])
            continue
        texts.append(tokenizer.render_chat(item.as_dicts(), add_generation_prompt=False))
        roles = [message.role for message in item.messages]
        before = item.messages[: roles.index("assistant")]
        prompts.append([{"role": m.role, "content": m.content} for m in before])
    return {"texts": texts, "rendered": bool(prompts), "prompts": prompts[:_MAX_PROMPTS]}
