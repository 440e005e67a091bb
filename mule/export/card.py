"""The model card of a merged model: README.md, in the form the Hugging Face hub reads."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mule import fsio
from mule.hub.repo import address_of

LICENSE_FILES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")
_LICENSE_LINE = re.compile(r"^license:\s*['\"]?([A-Za-z0-9][\w.+-]*)['\"]?\s*$", re.MULTILINE)
_LICENSE_LINK = re.compile(r"^license_(name|link):\s*(\S[^\n]*)$", re.MULTILINE)
_HEAD_BYTES = 8192  # a card's front matter stands at its beginning


@dataclass(frozen=True)
class CardFacts:
    """What the card tells: where the model comes from, and what was measured."""

    name: str
    base_dir: Path
    base_identity: Mapping[str, str | None]
    adapter: str
    adapter_sha256: str
    adapter_config: Mapping[str, Any]
    lineage: Mapping[str, Any]
    dtype: str
    report: Mapping[str, Any]


def base_name(folder: Path) -> str:
    """The base as others know it: its hub name and revision, else the name of its folder or run."""
    if address := address_of(folder):
        return f"{address[0]} (revision {address[1][:12]})"
    if folder.name.startswith("checkpoint-"):
        return f"run {folder.resolve().parent.name}, {folder.name}"
    return folder.resolve().name


def front_matter_of(folder: Path) -> str:
    """The YAML at the beginning of a folder's README.md, as text; "" where there is none."""
    readme = folder / "README.md"
    if not readme.is_file():
        return ""
    with open(readme, "rb") as file:
        text = file.read(_HEAD_BYTES).decode("utf-8", errors="replace")
    return text.split("\n---", 1)[0] if text.startswith("---") else ""


def licence_of(base: Path) -> str | None:
    """The licence that the base's README states, as it names it; None when it states none."""
    found = _LICENSE_LINE.search(front_matter_of(base))
    return found[1] if found else None


def licence_links(base: Path) -> list[str]:
    """The lines of a card that name and link a licence of its own kind."""
    return [match[0] for match in _LICENSE_LINK.finditer(front_matter_of(base))]


def write_card(folder: Path, facts: CardFacts) -> None:
    """Write README.md into an open folder."""
    fsio.write_text(folder / "README.md", _text(facts))


def _text(facts: CardFacts) -> str:
    licence, files = licence_of(facts.base_dir), licence_files(facts.base_dir)
    parts = [
        _front_matter(facts, licence),
        f"# {facts.name}\n",
        f"A fine-tuned model: the adapter `{facts.adapter}` merged into its base, "
        f"**{base_name(facts.base_dir)}**, by Mule. It is a plain model now; no adapter is needed.\n",
        f"## Licence\n\n{licence_text(licence, [file.name for file in files])}\n",
        _training(facts),
        _checked(facts),
        _USE,
        _hashes(facts),
    ]
    return "\n".join(parts)


def _front_matter(facts: CardFacts, licence: str | None) -> str:
    lines = ["library_name: transformers", "pipeline_tag: text-generation"]
    if licence is not None:
        lines.insert(0, f"license: {licence}")
        lines[1:1] = licence_links(facts.base_dir)
    if address := address_of(facts.base_dir):
        lines += [f"base_model: {address[0]}", "base_model_relation: finetune"]
    return "\n".join(["---", *lines, "tags: [mule, lora, merged]", "---", ""])


def licence_files(base: Path) -> list[Path]:
    """The files beside a model that say what may be done with it."""
    found = (file for pattern in LICENSE_FILES for file in base.glob(pattern) if file.is_file())
    return sorted(set(found))


def licence_text(licence: str | None, files: Sequence[str]) -> str:
    """What may be done with a model whose base states this; `files` are names of licence files."""
    if licence is None and not files:
        return (
            "The base's folder states no licence. Look it up where the base comes from before you "
            "pass this model on."
        )
    stated = f"The base states the licence **{licence}**. " if licence else ""
    copied = ", ".join(f"`{name}`" for name in files)
    copied = f"Its terms lie here as they came with the base: {copied}. " if files else ""
    return f"{stated}{copied}A fine-tuned model stays under the terms of its base."


def _training(facts: CardFacts) -> str:
    raw, lineage = facts.adapter_config, facts.lineage
    kind = "DoRA" if raw.get("use_dora") else "rsLoRA" if raw.get("use_rslora") else "LoRA"
    rows = [f"- method: {kind}, rank {raw.get('r')}, alpha {raw.get('lora_alpha')}"]
    if run := lineage.get("run"):
        rows.append(f"- run: {Path(run).name}")
    for source in lineage.get("sources", []):
        rows.append(f"- data: `{Path(source['file']).name}`, SHA-256 `{source['sha256']}`")
    if not lineage.get("sources"):
        rows.append("- data: not recorded (the adapter was not trained by Mule)")
    return "\n".join(["## Training\n", *rows, ""])


def _checked(facts: CardFacts) -> str:
    report, proof = facts.report, facts.report["proof"]
    near, before = proof["against_adapter"], proof["base_against_adapter"]
    lines = [
        "## Checked\n",
        f"On {proof['probe_tokens']} probe positions, in fp32, against the adapter on its base:\n",
        "| | greatest logit difference | KL in nats | same best token |",
        "|---|---|---|---|",
        _row(f"this model ({facts.dtype})", near),
        _row("the base alone", before),
        "",
        f"The merge was computed in fp32 (greatest logit difference {proof['arithmetic']:.2g}); "
        f"rounding to {facts.dtype} changes a logit by at most {proof['rounding']:.2g}. "
        f"{report['num_layers']} weight matrices changed.",
    ]
    for name, found in (report.get("quantized") or {}).items():
        lines.append(_quantised_line(name, found))
    return "\n".join([*lines, ""])


def _row(what: str, found: Mapping[str, float]) -> str:
    return (
        f"| {what} | {found['max_logit_difference']:.2g} | {found['kl_mean']:.2g} "
        f"| {found['top1']:.1%} |"
    )


def _quantised_line(name: str, found: Mapping[str, float]) -> str:
    return (
        f"\nTrained on a 4-bit base. Merged onto the {name} base it is {found['kl_mean']:.2g} nats "
        f"from what was trained (greatest logit difference {found['max_logit_difference']:.2g}, "
        f"same best token {found['top1']:.1%})."
    )


def _hashes(facts: CardFacts) -> str:
    rows = [f"- adapter: `{facts.adapter_sha256}`"]
    for part, word in (
        ("weights", "base, weights"),
        ("tokenizer", "base, tokenizer"),
        ("chat_template", "base, chat template"),
    ):
        if value := facts.base_identity.get(part):
            rows.append(f"- {word}: `{value}`")
    return "\n".join(
        ["## Hashes (SHA-256)\n", *rows, "", "`manifest.json` has those of the files.\n"]
    )


_USE = """\
## Use

In this folder:

```
mule chat .
mule export . --types q4_k_m
```

or with transformers:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".")
model = AutoModelForCausalLM.from_pretrained(".")
```
"""
