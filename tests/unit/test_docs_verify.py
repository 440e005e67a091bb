"""The page about planted faults, from a result."""

from __future__ import annotations

from pathlib import Path

from mule import fsio
from mule.commands.docs_verify import RESULT, verify_markdown

FAULT = {
    "fault": "norms",
    "title": "norms were less by one",
    "family": "gemma3_text",
    "type": "f16",
    "caught": True,
    "named": True,
    "first": "weights: norm + 1 forgotten | <s>",
    "also": ["kl_mean"],
    "was_run": True,
}
GOOD = {
    "family": "llama",
    "type": "q8_0",
    "ok": True,
    "kl_mean": 3.8e-5,
    "top1": 0.991,
    "num_greedy_equal": 7,
    "num_prompts": 8,
}


def test_the_page_counts_faults_and_good_exports(tmp_path: Path) -> None:
    assert "Nothing is recorded yet" in verify_markdown(tmp_path)
    other = FAULT | {"family": "llama", "named": False, "first": "x" * 400}
    result = {
        "faults": [FAULT, other],
        "good": [GOOD, GOOD | {"family": "qwen2", "kl_mean": 5e-4, "top1": 0.98}],
        "command": "python -m bench.verify run",
        "date": "2026-11-21",
        "seconds": 500,
        "xllamacpp": "1.0",
        "machine": {"cores": 2},
    }
    fsio.write_json(tmp_path / RESULT, result)
    page = verify_markdown(tmp_path)
    assert "**1 of 2 files with a planted fault were caught and named** (1 kinds)" in page
    assert "**2 of 2 good exports of 2 families passed**" in page
    row = "| norms were less by one | gemma3_text, llama | 1 of 2 | weights: norm + 1 forgotten"
    assert f"{row} \\| \\<s> |" in page
    assert "| q8_0 | 2 | 2 | 5.0e-04 | 98.0% | 14 of 16 |" in page
