"""The card of an export folder: README.md, made of its export.json alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mule.export.card import licence_text

Record = Mapping[str, Any]
_MB = 1e6
_LIBRARY = {"gguf": "gguf", "adapter": "gguf", "hf": "transformers"}
_WHAT = {
    "gguf": "in GGUF files, for llama.cpp, Ollama, Docker Model Runner, LM Studio and others",
    "adapter": "a LoRA adapter in a GGUF file, to be used on a GGUF file of its base",
    "hf": "in the form that transformers opens",
}


def card_text(record: Record) -> str:
    """The card, with the front matter that the hub reads."""
    parts = [
        _front_matter(record),
        f"# {record['name']}\n",
        f"{_origin(record)}, {_WHAT[record['kind']]}. Written by Mule {record['mule']}.\n",
        f"## Licence\n\n{licence_text(record['licence'], record['licence_files'])}\n",
        _files(record),
        _use(record),
        _training(record),
        _hashes(record),
    ]
    return "\n".join(part for part in parts if part)


def _front_matter(record: Record) -> str:
    lines = [f"license: {record['licence']}"] if record["licence"] else []
    lines += record["licence_links"]
    if record["languages"]:
        lines.append(f"language: [{', '.join(record['languages'])}]")
    if record["base_model"]:
        lines.append(f"base_model: {record['base_model']}")
        lines.append(f"base_model_relation: {record['relation']}")
    tags = ["mule", *(["lora"] if record["kind"] == "adapter" else [])]
    lines += [
        f"library_name: {_LIBRARY[record['kind']]}",
        "pipeline_tag: text-generation",
        f"tags: [{', '.join(tags)}]",
    ]
    return "\n".join(["---", *lines, "---", ""])


def _origin(record: Record) -> str:
    base = record["base"]
    if base is None:
        return "A model trained from random weights"
    return f"**{base}**" if record["relation"] == "quantized" else f"**{base}**, fine-tuned"


def _files(record: Record) -> str:
    header = [
        "## Files\n",
        "| file | type | size | bits a weight | checked |",
        "|---|---|---|---|---|",
    ]
    rows = [
        f"| `{entry['file']}` | {entry['type']} | {entry['size_bytes'] / _MB:,.1f} MB "
        f"| {_bits(entry)} | {_checked(entry)} |"
        for entry in record["files"]
    ]
    return "\n".join([*header, *rows, ""])


def _bits(entry: Mapping[str, Any]) -> str:
    found = entry.get("bits_per_weight")
    return f"{found:.2f}" if found else "-"


def _checked(entry: Mapping[str, Any]) -> str:
    check = entry.get("check")
    if check is None:
        return "not yet (`mule verify`)"
    return check["verdict"].replace("|", "\\|")


def _use(record: Record) -> str:
    if record["kind"] == "hf":
        return _TRANSFORMERS
    file = record["files"][-1]["file"]
    blocks = []
    if record["kind"] == "adapter":
        blocks.append(f"llama.cpp: `llama-cli -m BASE.gguf --lora {file}`")
        blocks.append(f"Ollama: `FROM ./BASE.gguf` and `ADAPTER ./{file}` in a Modelfile")
    else:
        blocks.append(f"llama.cpp: `llama-cli -m {file}`, or `llama-server -m {file}`")
    if "Modelfile" in record.get("others", ()):
        name = record["command_name"]
        blocks.append(f"Ollama: `ollama create {name} -f Modelfile`, then `ollama run {name}`")
    if record["kind"] == "gguf":
        blocks.append(
            f'Docker: `docker model package --gguf "$PWD"/{file} {record["command_name"]}`, then '
            f"`docker model run {record['command_name']}`"
        )
    rows = "\n".join(f"- {block}" for block in blocks)
    return f"## Use\n\nIn this folder:\n\n{rows}\n"


def _training(record: Record) -> str:
    lineage = record["lineage"]
    if record["relation"] == "quantized":
        return ""
    rows = [f"- run: {lineage['run']}"] if "run" in lineage else []
    for source in lineage.get("sources", []):
        size = f", {source['bytes'] / _MB:,.2f} MB" if "bytes" in source else ""
        rows.append(f"- data: `{source['file']}`{size}, SHA-256 `{source['sha256']}`")
    if not lineage.get("sources"):
        rows.append("- data: not recorded")
    return "\n".join(["## Training\n", *rows, ""])


def _hashes(record: Record) -> str:
    rows = ["`sha256sum -c SHA256SUMS` checks the files."]
    if lineage := record["lineage_sha256"]:
        rows.append(
            f"Lineage (data, tokenizer, base, run): `{lineage}`, in the files as mule.lineage."
        )
    rows.append(f"Weights: `{record['weights']}`.")
    return "\n".join(["## Hashes\n", "\n".join(rows), ""])


_TRANSFORMERS = """\
## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".")
model = AutoModelForCausalLM.from_pretrained(".")
```
"""
