"""Data sets as other tools name them, and what is known of the best known ones."""

from __future__ import annotations

from dataclasses import dataclass, field

from mule.compare.dialects.foreign_setup import ForeignSetup
from mule.compare.dialects.table import Given

# hub id -> (our format, training rows, 0 where they are not needed), as their pages on the hub say
KNOWN: dict[str, tuple[str, int]] = {
    "tatsu-lab/alpaca": ("alpaca", 52_002),
    "yahma/alpaca-cleaned": ("alpaca", 51_760),
    "mhenrichsen/alpaca_2k_test": ("alpaca", 2_000),
    "teknium/GPT4-LLM-Cleaned": ("alpaca", 0),
    "vicgalle/alpaca-gpt4": ("alpaca", 52_002),
    "databricks/databricks-dolly-15k": ("dolly", 15_011),
    "openai/gsm8k": ("gsm8k", 7_473),
    "fozziethebeat/alpaca_messages_2k_test": ("messages", 2_000),
    "HuggingFaceH4/ultrachat_200k": ("messages", 207_865),
    "HuggingFaceH4/no_robots": ("messages", 9_500),
    "HuggingFaceH4/deita-10k-v0-sft": ("messages", 0),
    "HuggingFaceTB/smoltalk": ("messages", 0),
    "HuggingFaceTB/smol-smoltalk": ("messages", 0),
    "trl-lib/Capybara": ("messages", 15_806),
    "mlabonne/FineTome-100k": ("sharegpt", 100_000),
    "cgato/SlimOrcaDedupCleaned": ("sharegpt", 0),
    "Open-Orca/SlimOrca": ("sharegpt", 0),
    "OpenAssistant/oasst1": ("oasst", 0),
    "stanfordnlp/imdb": ("text_rows", 25_000),
    "allenai/c4": ("text_rows", 0),
    "roneneldan/TinyStories": ("text_rows", 0),
    "Anthropic/hh-rlhf": ("preference", 0),
    "Intel/orca_dpo_pairs": ("preference", 12_859),
    "trl-lib/ultrafeedback_binarized": ("preference", 0),
    "HuggingFaceH4/ultrafeedback_binarized": ("preference", 0),
    "argilla/distilabel-intel-orca-dpo-pairs": ("preference", 0),
}
# names of LLaMA-Factory's own dataset_info.json
LLAMA_FACTORY_DEMOS: dict[str, str] = {
    "identity": "alpaca",
    "alpaca_en_demo": "alpaca",
    "alpaca_zh_demo": "alpaca",
    "glaive_toolcall_en_demo": "sharegpt",
    "glaive_toolcall_zh_demo": "sharegpt",
    "dpo_en_demo": "preference",
    "dpo_zh_demo": "preference",
    "kto_en_demo": "preference",
    "c4_demo": "text_rows",
    "wiki_demo": "text",
}


@dataclass(frozen=True)
class DataSet:
    """One entry of the data: where, its format of ours ("" is unknown), and what part of it."""

    path: str
    format: str = ""
    columns: dict[str, str] = field(default_factory=dict)
    part: str = ""
    is_valid: bool = False
    name: str = ""

    @property
    def known_format(self) -> str:
        """The format that the set is known to have, "" where nothing is known."""
        return LLAMA_FACTORY_DEMOS.get(self.name) or KNOWN.get(self.path, ("", 0))[0]


def put_sets(setup: ForeignSetup, sets: list[DataSet], given: Given | None) -> None:
    """Add what the sets say: data.train or data.valid, the format, the columns, and what is lost."""
    sets = [one for one in sets if one.path]
    if not sets:
        return
    key = "data.valid" if sets[0].is_valid else "data.train"
    paths = list(dict.fromkeys(one.path for one in sets))
    setup.put(key, paths, given)
    setup.put("sets", [*setup.value("sets", []), *sets], given)
    if sets[0].is_valid:
        return
    formats = {one.format or one.known_format for one in sets}
    columns = {ours: theirs for one in sets for ours, theirs in one.columns.items()}
    if len(formats) == 1 and (name := formats.pop()) and name != "preference":
        setup.put("data.format", name, given)
        if columns and name not in ("text", "wikitext"):
            setup.put("data.columns", columns, given)
    parts = [f"{one.path} ({one.part})" for one in sets if one.part and one.part != "a guess"]
    if parts and given is not None:
        more = f" and {len(parts) - 3} more" if len(parts) > 3 else ""
        setup.lose(
            Given(given.key, ", ".join(parts[:3]) + more, given.line),
            "whole files are read: name the file of that part, as hf://datasets/ORG/NAME/FILE, or "
            "make it with mule data mix",
        )


def known_rows(setup: ForeignSetup) -> int | None:
    """Rows of the training data where all sets are known, None elsewhere."""
    most = setup.number("max_samples")
    total = 0
    for one in setup.value("sets", []):
        if one.is_valid:
            continue
        rows = KNOWN.get(one.path, ("", 0))[1]
        if most is not None:
            rows = min(rows, int(most)) if rows else int(most)
        if not rows or one.part not in ("", "a guess"):
            return None
        total += rows
    return total or None
