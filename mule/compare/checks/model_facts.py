"""What a model's name tells: its family, its context and its size, as its config.json says them."""

from __future__ import annotations

import re

# pattern of the name, the first that fits -> (family, longest context in tokens; 0 is not known)
_MODELS: tuple[tuple[str, str, int], ...] = (
    (r"tiny-?llama", "tinyllama", 2_048),
    (r"code-?llama", "llama-2", 16_384),
    (r"llama-?3\.[1-9]", "llama-3", 131_072),
    (r"llama-?3(?![\d.])", "llama-3", 8_192),
    (r"llama-?2(?![\d.])|vicuna", "llama-2", 4_096),
    (r"smollm3", "smollm", 65_536),
    (r"smollm2", "smollm", 8_192),
    (r"smollm", "smollm", 2_048),
    (r"gemma-?3n?-(270m|1b)", "gemma", 32_768),
    (r"gemma-?3", "gemma", 131_072),
    (r"gemma", "gemma", 8_192),
    (r"qwen-?3", "qwen", 262_144),
    (r"qwen-?2\.5.*-1m", "qwen", 1_010_000),
    (r"qwen-?2(\.5)?", "qwen", 131_072),
    (r"qwen|qwq", "qwen", 0),
    (r"mistral-7b.*v0\.[12]\b|zephyr-7b", "mistral", 32_768),
    (r"mistral|mixtral|ministral|codestral|devstral", "mistral", 0),
    (r"phi-?(1|1[._]5|2)(?![\d.])", "phi", 2_048),
    (r"(?<![a-z])phi-?\d", "phi", 0),
    (r"falcon-?(rw-|7b|40b)", "falcon", 2_048),
    (r"pythia", "pythia", 2_048),
    (r"gpt-?2", "gpt-2", 1_024),
    (r"olmo-?2", "olmo", 4_096),
    (r"starcoder2", "starcoder", 16_384),
    (r"stablelm-base-alpha", "stablelm", 4_096),
    (r"deepseek", "deepseek", 0),
)
# pattern of a template's name -> the family whose markup it is
_TEMPLATES: tuple[tuple[str, str], ...] = (
    (r"llama-?_?2", "llama-2"),
    (r"llama-?_?3", "llama-3"),
    (r"gemma", "gemma"),
    (r"qwen", "qwen"),
    (r"mistral|ministral", "mistral"),
    (r"phi", "phi"),
    (r"deepseek", "deepseek"),
    (r"falcon", "falcon"),
    (r"olmo", "olmo"),
)
# markup in a template's text -> the family whose it is
_MARKUP: tuple[tuple[str, str], ...] = (
    ("<|start_header_id|>", "llama-3"),
    ("<start_of_turn>", "gemma"),
    ("<|endoftext|><|user|>", "phi"),
)
# every name that linear layers of the known families have in their files
MODULES = frozenset(
    {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        *("qkv_proj", "gate_up_proj", "query_key_value", "dense", "dense_h_to_4h"),
        *("dense_4h_to_h", "fc1", "fc2", "out_proj", "c_attn", "c_proj", "c_fc", "Wqkv"),
        *("w1", "w2", "w3", "wq", "wk", "wv", "wo", "in_proj", "x_proj", "dt_proj", "gate"),
        *("input_linear", "output_linear", "lm_head", "embed_tokens", "wte", "embed_out"),
        *("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "att_proj", "ff_proj"),
        *("linear_attn", "shared_head", "conv1d"),
    }
)


def families_of(name: str) -> set[str]:
    """Every family that a name holds: a distilled model names two."""
    return {family for pattern, family, _ in _MODELS if re.search(pattern, name.lower())}


def context_of(name: str) -> int:
    """The longest context of a model by its name, 0 where it tells none, or one of its own (128k)."""
    is_lengthened = re.search(r"(?<!\d)(?<!step-)\d{2,4}k\b", name.lower())
    return 0 if is_lengthened else _entry(name)[2]


def template_family(template: str) -> str:
    """The family whose markup a template is, by its name or its text, "" for a general one."""
    if "{" in template:
        return next((family for mark, family in _MARKUP if mark in template), "")
    plain = template.lower()
    return next((family for pattern, family in _TEMPLATES if re.search(pattern, plain)), "")


def billions_of(name: str) -> float | None:
    """Parameters in billions as the name says them (360M, 1.7B, 8x7B), None where it does not."""
    plain = name.lower().rpartition("/")[2]
    found = re.findall(r"(?<![\d.a-z])(?:\d+x)?(\d+(?:\.\d+)?)([bm])(?![a-z])", plain)
    if not found:
        return None
    count, unit = found[0]
    return float(count) / (1000 if unit == "m" else 1)


def _entry(name: str) -> tuple[str, str, int]:
    plain = name.lower().rpartition("/")[2]
    return next((row for row in _MODELS if re.search(row[0], plain)), ("", "", 0))
