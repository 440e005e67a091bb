"""Models on tasks: likelihoods by hand and in llama.cpp, answers, comparisons, `mule eval` itself."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mule import progress
from mule.adapters.source import find_source
from mule.errors import ModelError, UserError
from mule.evaluate.comparison import Compared, fewest_differing, judged, paired
from mule.evaluate.held_out import row_losses
from mule.evaluate.items import load_task
from mule.evaluate.measure import measure
from mule.evaluate.subject import Pair, Subject
from mule.export.gguf import write_gguf
from mule.tokenizer import Tokenizer
from tests.conftest import Mule
from tests.parity.tiny_gguf import save_tiny
from tests.tiny_folder import write_tiny_folder
from tests.unit.test_assume import QWEN

PAIRS = [
    Pair("The sea was", " calm that morning"),
    Pair("The sea was ", "calm"),  # the space goes with what follows
    Pair("They'd been told", ", again and again, that nobody would come."),
    Pair("", " far", ({"role": "user", "content": "How far?"},)),
]
TASK = """\
score: choice
prompt: "{q}"
choices: c
answer: "{a}"
group: kind
items:
  - {kind: sea, q: "The sea was", c: [calm, "a + b"], a: calm}
  - {kind: sea, q: "The old captain", c: [said, "x = 1"], a: said}
  - {kind: code, q: "def add(a, b):", c: [return, "the"], a: 0}
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models, one of them as a GGUF file too."""
    folder = tmp_path_factory.mktemp("eval")
    for name, seed in (("one", 0), ("two", 1)):
        save_tiny(
            folder / name, "qwen3", num_hidden_layers=2, seed=seed, max_position_embeddings=128
        )
    write_gguf(folder / "one", folder / "one.gguf", "f32")
    (folder / "task.yaml").write_text(TASK)
    return folder


def subject(file: Path) -> Subject:
    return Subject(file.name, find_source(str(file)))


def likelihoods(file: Path) -> list[float]:
    with progress.task("") as bar:
        return subject(file).log_likelihoods(PAIRS, bar=bar)


def by_hand(folder: Path) -> list[float]:
    """The sum of the logits' log-softmax, one text at a time."""
    model, tokenizer = subject(folder).loaded
    found = []
    for pair in PAIRS:
        if pair.messages:
            before = tokenizer.encode_prompt(list(pair.messages))
            ids = before + tokenizer.encode(pair.continuation)
        else:
            before = tokenizer.encode(pair.context.rstrip())
            ids = tokenizer.encode(pair.context + pair.continuation)
        with torch.no_grad():
            logits = model(torch.tensor([ids]))[0].double().log_softmax(-1)
        found.append(sum(float(logits[i - 1, ids[i]]) for i in range(len(before), len(ids))))
    return found


def test_likelihoods_are_sums_of_log_probabilities(home: Path) -> None:
    assert likelihoods(home / "one") == pytest.approx(by_hand(home / "one"), abs=1e-3)


def test_llama_cpp_finds_the_same_likelihoods(home: Path) -> None:
    # Its cache is in fp16: each of a dozen tokens may be off by a few thousandths.
    assert likelihoods(home / "one.gguf") == pytest.approx(by_hand(home / "one"), abs=0.05)


def test_a_question_that_cannot_be_asked_is_refused(home: Path) -> None:
    with progress.task("") as bar:
        with pytest.raises(UserError, match="a question without a token"):
            subject(home / "one").log_likelihoods([Pair("", " a")], bar=bar)
        with pytest.raises(UserError, match="the context holds 128"):
            subject(home / "one").log_likelihoods([Pair("word " * 200, " a")], bar=bar)


def test_broken_weights_are_an_error(home: Path) -> None:
    one = subject(home / "one")
    with torch.no_grad():
        one.loaded[0].lm_head.weight[3] = torch.nan
    with progress.task("") as bar, pytest.raises(ModelError, match="that are no numbers"):
        one.log_likelihoods(PAIRS, bar=bar)


def test_choices_are_taken_by_likelihood(home: Path) -> None:
    task = load_task(str(home / "task.yaml"))
    found = measure(subject(home / "one"), task)
    for item, kept, right, norm in zip(
        task.items, found.answers, found.scores["accuracy"], found.scores["accuracy_norm"]
    ):
        sums = kept["log_likelihoods"]
        assert kept["answer"] == item.choices[sums.index(max(sums))]
        assert right == (kept["answer"] == item.references[0])
        each = [value / len(choice) for value, choice in zip(sums, item.choices)]
        assert norm == (each.index(max(each)) == item.right)
    same = measure(subject(home / "one.gguf"), task)
    assert same.scores == found.scores


ANSWERED = """\
score: checks
prompt: "{q}"
text_prompt: "The {q}"
max_tokens: 9
checks: {max_words: 3, lacks: ["zebra"]}
items: [{q: sea}, {q: captain}, {q: morning}]
"""


@pytest.mark.parametrize("name", ["one", "one.gguf"])
def test_answers_are_checked_and_their_ends_counted(home: Path, name: str) -> None:
    (home / "answered.yaml").write_text(ANSWERED)
    found = measure(subject(home / name), load_task(str(home / "answered.yaml")))
    assert list(found.scores) == ["all_checks", "lacks", "max_words"]
    assert found.scores["lacks"] == [1.0] * 3
    for kept, short in zip(found.answers, found.scores["max_words"]):
        assert short == (len(kept["answer"].split()) <= 3)
    stops = sum(kept["ended"] == "stop" for kept in found.answers) / 3
    assert found.along["stops"] == stops and 0 <= found.along["repetition"] <= 1


def test_a_question_beyond_the_context_counts_as_unanswered(home: Path) -> None:
    (home / "long.yaml").write_text(
        "score: stops\nprompt: '{q}'\nmax_tokens: 2\nitems:\n  - {q: sea}\n"
        f"  - {{q: '{'word ' * 150}'}}\n"
    )
    found = measure(subject(home / "one"), load_task(str(home / "long.yaml")))
    assert found.answers[1] == {"answer": "", "ended": "too long"}
    assert found.scores["stops"][1] == 0.0


def test_held_out_loss_row_by_row_in_llama_cpp(home: Path, tmp_path: Path) -> None:
    from mule.data.prepare import RowSettings, prepare
    from mule.data.sources.options import ReadOptions

    chats = [
        {"prompt": "How far?", "completion": f"{word} the sea was calm"}
        for word in ("Not", "Far", "So", "And", "But")
    ]
    data = tmp_path / "chats.jsonl"
    data.write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    tokenizer = Tokenizer.load(home / "one")
    settings = RowSettings(ReadOptions(), 60)
    shards = prepare([data], tokenizer, settings, out_dir=tmp_path / "rows", valid=True)
    ours = row_losses(subject(home / "one"), shards, tokenizer, None)
    theirs = row_losses(subject(home / "one.gguf"), shards, tokenizer, None)
    assert len(ours.by_row.counts) == shards.num_rows > 1
    assert list(ours.by_row.counts) == list(theirs.by_row.counts)
    assert ours.by_row.nll == pytest.approx(theirs.by_row.nll, rel=1e-2)
    assert ours.by_label.loss == pytest.approx(ours.by_row.loss)
    assert ours.bits_per_byte == pytest.approx(ours.by_row.bits / ours.num_bytes)
    other = Tokenizer.train(["sea calm far"] * 9, 300)
    shards = prepare([data], other, settings, out_dir=tmp_path / "other", valid=True)
    with pytest.raises(ModelError, match="other tokens than the first model"):
        row_losses(subject(home / "one.gguf"), shards, other, None)


# ---------------------------------------------------------------- comparing


def rows(first: list[float], second: list[float], measure: str = "accuracy") -> Compared:
    return judged([paired("t", measure, ("base", "tuned"), (first, second))], ["loss"])[0]


def test_equal_models_show_no_difference_and_a_regression_does() -> None:
    rng = random.Random(1)
    base = [float(rng.random() < 0.7) for _ in range(100)]
    assert rows(base, base).verdict == "no measurable difference"
    broken = [value if i % 4 else 0.0 for i, value in enumerate(base)]
    found = rows(base, broken)
    assert found.verdict == "worse" and found.difference < -0.1 and found.high < 0
    assert rows(broken, base).verdict == "better"
    assert rows(broken, base, "loss").verdict == "worse"
    few = [value if i > 3 else 1 - value for i, value in enumerate(base)]
    assert rows(base, few).verdict == "no measurable difference"


@pytest.mark.parametrize(("num_rows", "fewest"), [(1, 6), (2, 7), (7, 9)])
def test_the_fewest_items_that_can_show(num_rows: int, fewest: int) -> None:
    assert fewest_differing(num_rows) == fewest
    for differing, shows in ((fewest, "worse"), (fewest - 1, "no measurable difference")):
        second = [0.0] * differing + [1.0] * 40
        row = paired("t", "accuracy", ("a", "b"), ([1.0] * (differing + 40), second))
        same = [paired("t", "accuracy", ("a", "b"), ([1.0], [1.0]))] * (num_rows - 1)
        assert judged([row, *same], [])[0].verdict == shows


def test_of_tables_of_equal_models_few_claim_a_difference() -> None:
    """The promise is for a whole table: here of four rows, where four items in ten may differ."""
    rng, tables, claims = random.Random(2), 50, 0
    for _ in range(tables):
        table = []
        for _ in range(4):
            flips = [(rng.random() < 0.5, rng.random() < 0.4) for _ in range(60)]
            first = [float(value) for value, _ in flips]
            second = [float(rng.random() < 0.5) if new else float(v) for v, new in flips]
            table.append(paired("t", "accuracy", ("a", "b"), (first, second)))
        claims += any(row.verdict != "no measurable difference" for row in judged(table, []))
    assert claims <= 0.05 * tables + 3 * (0.05 * 0.95 * tables) ** 0.5


# ---------------------------------------------------------------- the command


def test_models_beside_each_other(home: Path, mule_cli: Mule, tmp_path: Path) -> None:
    models = [str(home / name) for name in ("one", "two", "one.gguf")]
    words = ["--task", str(home / "task.yaml"), "--out", "eval.json", "--show-failures", "1"]
    code, out, err = mule_cli("eval", *models, *words)
    assert code == 0, err
    assert f"two against {models[0]}: " in out and f"{models[2]} against {models[0]}: " in out
    assert f"{models[2]}  " in out and "task, by group" in out
    assert "+0.0 points (+0.0 to +0.0): no measurable difference" in out
    assert out.splitlines()[-1] == f"next: mule chat {' '.join(models)}"
    written = json.loads((tmp_path / "eval.json").read_text())
    assert [item["place"] for item in written["items"]] == [
        f"task.yaml item:{n}" for n in (1, 2, 3)
    ]
    assert set(written["items"][0]["answers"]) == {models[0], "two", models[2]}
    assert "whether the training data holds these items is not known" in err
    row = written["tasks"][0]
    assert (row["task"], row["measure"], row["items"]) == ("task", "accuracy", 3)
    assert set(row["by_group"]) == {"sea", "code"}
    assert {c["model"] for c in written["comparison"]} == {"two", models[2]}


def test_loss_of_several_models_on_a_file(home: Path, mule_cli: Mule, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("The sea was calm that morning. " * 60)
    models = [str(home / name) for name in ("one", "two", "one.gguf")]
    code, out, err = mule_cli("eval", *models, "--data", "text.txt", "--task", "held-out", "--json")
    assert code == 0, err
    found = json.loads(out.splitlines()[-1])
    first, second, third = found["held_out"]
    assert found["loss"] == first["loss"] and found["rows"] > 1
    assert third["loss"] == pytest.approx(first["loss"], rel=1e-2)
    assert second["loss"] != first["loss"]
    compared = {row["model"]: row for row in found["comparison"]}
    assert compared["two"]["difference"] == pytest.approx(second["loss"] - first["loss"])


def test_another_tokenizer_gets_rows_of_its_own(home: Path, mule_cli: Mule, tmp_path: Path) -> None:
    write_tiny_folder(tmp_path / "other", QWEN)
    (tmp_path / "text.txt").write_text("the cat sat on the red mat near the old king. " * 60)
    words = ["--data", "text.txt", "--task", "held-out", "--json"]
    code, out, err = mule_cli("eval", str(home / "one"), "other", *words)
    assert code == 0, err
    found = json.loads(out.splitlines()[-1])
    first, other = found["held_out"]
    assert (first["same_rows"], other["same_rows"]) == (True, False)
    assert first["num_targets"] != other["num_targets"]
    assert found["comparison"] == []
    assert "another tokenizer: compare bits per byte" in err


@pytest.mark.parametrize(
    ("words", "said", "hint"),
    [
        ([], "no model is named", "mule eval MODEL, as runs/my-lora"),
        (["ONE"], "comes from no run, so it has no validation rows", "or a task: --task general"),
        (["ONE", "--task", "x", "--task", "x"], "the task x is named twice", "once"),
        (["ONE", "--task", "TASK", "--task", "t/task.yaml"], "two tasks are called task", "rename"),
        (["GGUF", "--data", "t.txt"], "a GGUF file, whose tokenizer", "mule eval RUN FILE.gguf"),
        (["ONE", "--data", "t.txt", "--max-items", "2"], "--max-items cannot take", "--task gen"),
        (["ONE", "--data", "t.txt", "--show-failures", "2"], "--show-failures cannot", "leave it"),
        (["ONE", "--task", "stops", "--max-rows", "2"], "--max-rows cannot", "--task held-out"),
        (["ONE", "--task", "stops", "--out", "no/e.json"], "no: no such folder", "mkdir -p no"),
        (["--export", "helm", "d", "--task", "general"], "helm is no program", "lm-eval DIR"),
        (["--export", "lm-eval", "d"], "no task is named", "--task general"),
        (["--export", "lm-eval", "d", "--task", "stops"], "stops has no equal", "choice, exact"),
    ],
)
def test_what_cannot_be_evaluated(
    home: Path, mule_cli: Mule, tmp_path: Path, words: list[str], said: str, hint: str
) -> None:
    (tmp_path / "t.txt").write_text("A text.")
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "task.yaml").write_text(TASK)
    places = {"ONE": str(home / "one"), "GGUF": str(home / "one.gguf")}
    places["TASK"] = str(home / "task.yaml")
    code, _, err = mule_cli("eval", *(places.get(word, word) for word in words))
    assert code == 2
    assert said in err and hint in err


def test_exported_tasks_are_read_by_the_harness(home: Path, mule_cli: Mule, tmp_path: Path) -> None:
    code, out, err = mule_cli("eval", "--task", "general", "--export", "lm-eval", "lm")
    assert code == 0, err
    assert "--include_path lm --tasks mule_general" in out
    lines = (tmp_path / "lm" / "mule_general.yaml").read_text().splitlines()
    settings = {key: json.loads(value) for key, value in (line.split(": ", 1) for line in lines)}
    assert settings["output_type"] == "multiple_choice" and settings["dataset_path"] == "json"
    file = Path(settings["dataset_kwargs"]["data_files"]["test"])
    first = json.loads(file.read_text().splitlines()[0])
    assert first["choices"][first["right"]] == "Paris"


def with_training_data(
    folder: Path, rows: list[dict[str, Any]], say: Callable[[str], None] = lambda _: None
) -> dict[int, str]:
    from mule.data.sources import read
    from mule.evaluate.overlap import Training

    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = load_task(str(folder / "task.yaml"))
    return Training(list(read([folder / "train.jsonl"]))).overlapping(task)


def test_a_planted_leak_is_found(tmp_path: Path) -> None:
    long = "If a train leaves the station at nine and another at ten, which of both is the first?"
    (tmp_path / "task.yaml").write_text(
        "score: exact\nprompt: '{q}'\nanswer: '{a}'\nitems:\n"
        f"  - {{q: '{long}', a: first}}\n  - {{q: What is a mule?, a: an animal}}\n"
        "  - {q: What is a donkey?, a: an animal}\n"
    )
    clean = {"prompt": "What is a horse?", "completion": "an animal"}
    leaks = [
        {"prompt": f"Think: {long} Say it.", "completion": "the one at nine"},
        {"prompt": "what is a MULE", "completion": "I do not know"},
    ]
    assert with_training_data(tmp_path, [clean]) == {}
    found = with_training_data(tmp_path, [clean, *leaks])
    assert set(found) == {0, 1}
    assert found[0].startswith("if a train leaves the station") and found[1] == "what is a mule"
