"""The same tasks for EleutherAI's lm-evaluation-harness: a YAML file and the items of each.

`accuracy` is its acc, `accuracy_norm` its acc_norm, `exact_match` its exact_match.
Source: lm_eval 0.4.13, docs/new_task_guide.md.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mule import fsio
from mule.errors import UserError
from mule.evaluate.items import Task
from mule.evaluate.numbers import final_number

_WRITTEN = ("choice", "exact", "number")
_NUMBER = r"(-?[$0-9.,]{2,})|(-?[0-9]+)"  # as the harness's own gsm8k.yaml has it
_MEAN = {"aggregation": "mean", "higher_is_better": True}


def write(tasks: Sequence[Task], folder: Path) -> list[str]:
    """Write each task into `folder`; their names there. Raises UserError for what cannot be said."""
    for task in tasks:
        _refuse(task)
    folder.mkdir(parents=True, exist_ok=True)
    names = []
    for task in tasks:
        name = f"mule_{re.sub(r'[^0-9A-Za-z]+', '_', task.name)}"
        rows = folder.resolve() / f"{name}.jsonl"
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in _rows(task)]
        fsio.write_text(rows, "".join(lines))
        settings = {"task": name, **_common(rows), **_own(task), "metadata": {"version": 1.0}}
        # Each value as JSON, which is YAML too and leaves no text to be read as a number or as no.
        text = "".join(f"{key}: {json.dumps(value)}\n" for key, value in settings.items())
        fsio.write_text(folder / f"{name}.yaml", text)
        names.append(name)
    return names


def _refuse(task: Task) -> None:
    if task.file.score not in _WRITTEN:
        raise UserError(
            f"{task.name}: score {task.file.score} has no equal in the harness",
            f"tasks of score {', '.join(_WRITTEN)} can be written",
        )
    if task.file.chat == "yes":
        raise UserError(
            f"{task.name}: is asked as a chat, which the harness decides when it runs",
            "write chat: auto, and give lm_eval --apply_chat_template",
        )
    if any(len(item.references) > 1 for item in task.items):
        raise UserError(
            f"{task.name}: an item has several right answers, and the harness takes one",
            "leave one in the answer of each row",
        )


def _rows(task: Task) -> list[dict[str, Any]]:
    found = []
    for item in task.items:
        row: dict[str, Any] = {"text": item.text}
        if task.is_choice:
            row |= {"choices": list(item.choices), "right": item.right}
        elif task.file.score == "number":
            row["right"] = f"{final_number(item.references[0])}"
        else:
            row["right"] = item.references[0]
        found.append(row)
    return found


def _common(rows: Path) -> dict[str, Any]:
    return {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(rows)}},
        "test_split": "test",
        "doc_to_text": "text",
        "doc_to_target": "right",
        "target_delimiter": " ",
    }


def _own(task: Task) -> dict[str, Any]:
    if task.is_choice:
        metrics = [{"metric": name, **_MEAN} for name in ("acc", "acc_norm")]
        return {
            "output_type": "multiple_choice",
            "doc_to_choice": "choices",
            "metric_list": metrics,
        }
    exact = {"metric": "exact_match", **_MEAN, "ignore_case": True}
    own: dict[str, Any] = {
        "output_type": "generate_until",
        "generation_kwargs": {
            "until": task.file.stop,
            "max_gen_toks": task.file.max_tokens,
            "do_sample": False,
        },
    }
    if task.file.score == "number":
        ignored = {"regexes_to_ignore": [",", r"\$", r"\.0*$", r"\.$"]}
        return own | {"metric_list": [exact | ignored], "filter_list": _filters()}
    edges = r"""[\s"'`*_.,;:!?\u201c\u201d\u2018\u2019]+"""
    return own | {"metric_list": [exact | {"regexes_to_ignore": [f"^{edges}|{edges}$"]}]}


def _filters() -> list[dict[str, Any]]:
    """What follows #### alone; and the last number of all."""
    first = {"function": "take_first"}
    marked = {"function": "regex", "regex_pattern": r"#### (\-?[0-9\.\,]+)"}
    last = {"function": "regex", "group_select": -1, "regex_pattern": _NUMBER}
    return [
        {"name": "strict-match", "filter": [marked, first]},
        {"name": "flexible-extract", "filter": [last, first]},
    ]
