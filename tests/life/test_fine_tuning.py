"""A fine-tune on chats through the command line: its base, its evaluations, and where it ends."""

from __future__ import annotations

import json
import random
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mule import fsio, progress
from mule.adapters.source import find_source, load_source
from mule.models.config import ModelConfig
from mule.models.decoder import empty_decoder
from mule.models.folder import model_state, save_model
from mule.run import Run
from mule.tokenizer import Tokenizer
from mule.train.evaluator import in_short
from tests.life.harness_ranks import Ranks
from tests.life.tiny_life import Forker, outcome

RECIPE = """\
model: {path: base}
data: {train: [chats.jsonl], valid: [others.jsonl], max_seq_length: 64}
train: {seed: 3, steps: 40, step_rows: 2, micro_batch_rows: 1, threads: 1, compile: false,
  precision: fp32}
optim: {learning_rate: 0.02}
checkpoint: {every_steps: 7}
evaluate: {every_steps: 3}
"""
PATIENT = "evaluate.patience=2"
PLAIN = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + '<|endoftext|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def sentence(rng: random.Random, length: int) -> str:
    return " ".join(f"{rng.choice('bcdfgkmprt')}{rng.randrange(100)}" for _ in range(length))


def write_base(folder: Path, *, markers: float) -> None:
    """A model of random weights; the rows of its chat markers are times `markers`."""
    rng = random.Random(1)
    tokenizer = Tokenizer.train([sentence(rng, 9) for _ in range(300)], 400)
    config = ModelConfig(
        family="qwen3",
        vocab_size=-(-tokenizer.vocab_size // 64) * 64,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        num_kv_heads=1,
        head_dim=10,
        intermediate_size=56,
        max_position_embeddings=128,
        qk_norm=True,
    )
    model = empty_decoder(config, torch.float32)
    model.init_weights(5)
    with torch.no_grad():
        for text in ("<|im_start|>", "<|im_end|>"):
            model.model.embed_tokens.weight[tokenizer.encode(text, special=True)] *= markers
    with fsio.atomic_folder(folder) as out:
        save_model(model_state(model), config, out)
        tokenizer.save(out)


def write_chats(file: Path, count: int, seed: int) -> None:
    rng = random.Random(seed)
    rows = [
        {
            "messages": [
                {"role": "user", "content": sentence(rng, 4)},
                {"role": "assistant", "content": sentence(rng, 6)},
            ]
        }
        for _ in range(count)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bases")
    write_base(folder / "instruct", markers=1.0)
    write_base(folder / "raw", markers=1e-3)
    return folder


def home(bases: Path, folder: Path, base: str = "instruct") -> Path:
    """A folder with a base, chats to learn, others to validate on, and the recipe."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copytree(bases / base, folder / "base")
    write_chats(folder / "chats.jsonl", 24, seed=1)
    write_chats(folder / "others.jsonl", 8, seed=2)
    (folder / "tune.yaml").write_text(RECIPE)
    return folder


def train(forker: Forker, folder: Path, *words: str, code: int = 0) -> str:
    """Run `mule train tune.yaml`; what it said, on one line."""
    log = folder / "output.log"
    log.unlink(missing_ok=True)
    found = forker.run(folder, "train", "tune.yaml", *words)
    assert found == code, log.read_text()
    return " ".join(log.read_text().split())


def tuned(folder: Path) -> Run:
    return Run.open(folder / "runs" / "tune")


# ---------------------------------------------------------------- the base


def test_an_adapter_on_untrained_markers_is_refused(
    forker: Forker, bases: Path, tmp_path: Path
) -> None:
    folder = home(bases, tmp_path / "h", "raw")
    text = train(forker, folder, "adapter.kind=lora", code=2)
    assert (
        "model.path = base is a base model: the chat markers <|im_start|>, <|im_end|> were never "
        "trained, and adapter.kind = lora leaves them so; it would not know where a turn begins "
        "or ends" in text
    )
    assert (
        "hint: start from its instruct sibling, or one that was fine-tuned on chats before; or "
        "train all weights: adapter.kind=none; or set tokenizer.path to a copy of its tokenizer "
        "whose chat_template.jinja writes plain words instead, and ends a turn as a document ends"
        in text
    )
    assert not (folder / "runs" / "tune").exists(), "the name stays free"
    text = train(forker, folder, "train.freeze=[model.embed_tokens.*]", code=2)
    assert "and train.freeze = model.embed_tokens.* leaves them so" in text


def test_all_weights_learn_untrained_markers_which_is_said(
    forker: Forker, bases: Path, tmp_path: Path
) -> None:
    folder = home(bases, tmp_path / "h", "raw")
    text = train(forker, folder, "train.steps=6")
    assert (
        "warning: base is a base model, not an instruct one: the chat markers <|im_start|>, "
        "<|im_end|> were never trained. They are now, with all weights; but from your chats alone "
        "it must learn to answer at all, which takes a few hundred. With fewer, start from its "
        "instruct sibling" in text
    )
    name = "model.embed_tokens.weight"
    before = load_file(folder / "base" / "model.safetensors")[name]
    after = load_file(tuned(folder).checkpoints()[-1][1] / "model.safetensors")[name]
    assert (before[1:3].norm(dim=1) < 1e-3).all() and (after[1:3].norm(dim=1) > 0.1).all()


def test_trained_markers_are_used(forker: Forker, bases: Path, tmp_path: Path) -> None:
    folder = home(bases, tmp_path / "h")
    text = train(forker, folder, "train.steps=2", "adapter.kind=lora")
    assert "note: base knows its chat format: the markers <|im_start|>, <|im_end|> are" in text


def test_few_words_do_not_tell(forker: Forker, bases: Path, tmp_path: Path) -> None:
    folder = home(bases, tmp_path / "h", "raw")
    chat = [{"role": "user", "content": "a b c"}, {"role": "assistant", "content": "d e f"}]
    (folder / "chats.jsonl").write_text(json.dumps({"messages": chat}) + "\n")
    text = train(forker, folder, "train.steps=2", "adapter.kind=lora")
    assert (
        "note: the chats have too few different words to tell whether base was trained on chats"
        in text
    )


def test_a_template_of_plain_words_needs_no_markers(
    forker: Forker, bases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The third way out: an adapter on a base model, and the adapter answers in that format."""
    folder = home(bases, tmp_path / "h", "raw")
    shutil.copytree(folder / "base", folder / "plain")
    (folder / "plain" / "chat_template.jinja").write_text(PLAIN)
    text = train(forker, folder, "train.steps=2", "adapter.kind=lora", "tokenizer.path=plain")
    assert (
        "note: the chat template of base writes no markers, so that nothing tells whether it was "
        "trained on chats: a base model takes a few hundred of them to learn to answer" in text
    )
    monkeypatch.chdir(folder)
    _, tokenizer = load_source(find_source("runs/tune"))
    assert tokenizer.render_chat(
        [{"role": "user", "content": "a"}], add_generation_prompt=True
    ) == ("user: a<|endoftext|>\nassistant: ")


# ---------------------------------------------------------------- along the way


def test_the_answers_of_the_base_come_first(forker: Forker, bases: Path, tmp_path: Path) -> None:
    folder = home(bases, tmp_path / "h")
    words = ('evaluate.prompts=["b1 c2","t9"]', "train.steps=7", "optim.learning_rate=1e-9")
    text = train(forker, folder, *words)
    rows = tuned(folder).samples()
    assert [row["step"] for row in rows] == [0, 3, 6, 7]
    assert all(set(row["answers"]) == {"b1 c2", "t9"} for row in rows)
    assert rows[0]["answers"] == rows[-1]["answers"], "nothing was learned at that rate"
    for step in (0, 3, 6, 7):
        assert f"note: step {step}: b1 c2 -> " in text and f"note: step {step}: t9 -> " in text


def test_an_answer_is_shown_on_one_line_and_in_short() -> None:
    assert in_short("Two\n\nlines. ") == "Two lines."
    assert in_short("x" * 200) == "x" * 200 and in_short("x" * 201) == "x" * 200 + "..."


def test_overfitting_is_said_once_and_the_best_is_taken(
    forker: Forker, bases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = home(bases, tmp_path / "h")
    text = train(forker, folder, "checkpoint.every_steps=3", "optim.schedule=constant")
    run = tuned(folder)
    [event] = [event for event in run.events() if event["kind"] == "overfitting"]
    assert text.count("warning: overfitting: the validation loss rose from ") == 1
    assert event["cause"] in text
    assert (
        "The model learns its data by heart. The best checkpoint is kept; evaluate.patience=2 ends "
        "such a run by itself; fewer epochs, more data or train.dropout=0.1 help" in text
    )
    losses = {row["step"]: row["val_loss"] for row in run.metrics() if "val_loss" in row}
    best = run.best()
    assert best is not None and best["val_loss"] == min(losses.values()) == losses[best["step"]]
    assert best["step"] < 40 and run.checkpoint_dir(best["step"]).is_dir()
    monkeypatch.chdir(folder)
    told: list[str] = []

    class Ear(progress.Silence):
        def note(self, text: str, level: str) -> None:
            told.append(text)

    with progress.using(Ear()):
        source = find_source("tune")
    assert source.model_dir is not None
    assert source.model_dir.name == f"checkpoint-{best['step']:08d}"
    assert told[0] == (
        f"tune: taking the checkpoint after update {best['step']}, whose validation loss "
        f"{best['val_loss']:.4f} is the best; the last was {losses[40]:.4f} (for the last weights, "
        "name the folder runs/tune/checkpoint-00000040)"
    )


# ---------------------------------------------------------------- where it ends


@pytest.fixture(scope="module")
def stopped(forker: Forker, bases: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that evaluate.patience ended; its output is kept as first.log."""
    folder = home(bases, tmp_path_factory.mktemp("stopped") / "h")
    (folder / "first.log").write_text(train(forker, folder, PATIENT))
    return folder


def test_patience_ends_a_run_cleanly(stopped: Path) -> None:
    run, text = tuned(stopped), (stopped / "first.log").read_text()
    losses = {row["step"]: row["val_loss"] for row in run.metrics() if "val_loss" in row}
    end, best = max(losses), min(losses, key=lambda step: losses[step])
    assert end == best + 6 < 40, "two evaluations after the best"
    cause = (
        f"2 evaluations without a better validation loss ({losses[best]:.4f} after update {best})"
    )
    assert f"note: stopped early after update {end}: {cause}" in text
    assert f"stopped early {cause}" in text and f"best step {best}" in text
    [event] = [event for event in run.events() if event["kind"] == "stopped early"]
    assert (event["step"], event["cause"]) == (end, cause)
    assert run.state() == "finished" and run.events()[-1]["step"] == end
    pointed = run.best()
    assert pointed is not None and pointed["step"] == best, "saved beside the schedule of 7"
    assert [step for step, _ in run.checkpoints()][-1] == end
    assert run.checkpoint_dir(best).is_dir()


def test_such_a_run_is_finished_when_it_is_resumed(
    forker: Forker, stopped: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "again"
    shutil.copytree(stopped, folder)
    before = outcome(folder / "runs" / "tune")
    text = train(forker, folder, PATIENT, "--resume")
    assert f"note: this run is finished: it stopped early after update {before['step']} (" in text
    assert (
        "To go on from its best weights, start another: --name ANOTHER model.path=runs/tune" in text
    )
    assert outcome(folder / "runs" / "tune") == before
    assert [e["kind"] for e in tuned(folder).events()].count("stopped early") == 1


@pytest.mark.parametrize(
    "share", [0.6, *(pytest.param(share, marks=pytest.mark.slow) for share in (0.35, 0.96))]
)
def test_a_killed_run_stops_where_a_whole_one_does(
    forker: Forker, bases: Path, stopped: Path, tmp_path: Path, share: float
) -> None:
    folder = home(bases, tmp_path / "h")
    die_at = int(int((stopped / "durable_calls").read_text()) * share)
    words = ("train", "tune.yaml", PATIENT)
    assert forker.run(folder, *words, die_at=die_at) == -signal.SIGKILL
    assert forker.run(folder, *words, "--resume") == 0, (folder / "output.log").read_text()
    assert outcome(folder / "runs" / "tune") == outcome(stopped / "runs" / "tune")
    kinds = [event["kind"] for event in tuned(folder).standing_events("stopped early")]
    assert kinds == ["stopped early"]


@pytest.mark.slow
def test_two_processes_stop_together(ranks: Ranks, bases: Path, tmp_path: Path) -> None:
    folder = home(bases, tmp_path / "h")
    ended = ranks.run(folder, 2, "train", "tune.yaml", PATIENT)
    assert ended.codes == [0, 0], ended.texts
    assert "stopped early after update" in ended.texts[0] and not ended.texts[1]
    best = tuned(folder).best()
    assert best is not None and tuned(folder).metrics()[-1]["step"] == best["step"] + 6 < 40
    again = ranks.run(folder, 2, "train", "tune.yaml", PATIENT, "--resume")
    assert again.codes == [0, 0] and "this run is finished" in again.texts[0], again.texts


def test_patience_without_validation_is_refused(
    forker: Forker, bases: Path, tmp_path: Path
) -> None:
    folder = home(bases, tmp_path / "h")
    text = train(forker, folder, PATIENT, "data.valid=null", "data.valid_share=0", code=2)
    assert "evaluate.patience = 2 cannot take effect: there are no validation rows" in text


# ---------------------------------------------------------------- what is chosen


def test_what_was_not_said_is_chosen_and_told(forker: Forker, bases: Path, tmp_path: Path) -> None:
    folder = home(bases, tmp_path / "h")
    (folder / "tune.yaml").write_text(
        "model: {path: base}\n"
        "data: {train: [chats.jsonl], max_seq_length: 64, packing: false}\n"
        "train: {threads: 1, compile: false, precision: fp32}\n"
    )
    text = train(forker, folder)
    assert "note: 20 chats to train on; 4 are held out for validation, chosen by train." in text
    assert "note: 20 chats: 50 updates = 10 epochs of 5 updates" in text
    resolved = (folder / "runs" / "tune" / "resolved.yaml").read_text()
    assert "valid_share: 0.2\n" in resolved
    assert "learning_rate: 2e-05  # all weights of a trained model" in resolved
    assert "steps: 50  # 10 epochs of 5.0 updates, chosen for 20 chats\n" in resolved
    assert "step_rows: 4  # about 4 of 20 chats, at 1.00 a row\n" in resolved
    assert "every_steps: 5  # an evaluation an epoch\n" in resolved
    before = outcome(folder / "runs" / "tune")
    train(forker, folder, "--resume")  # the recipe as typed decides the same again
    assert outcome(folder / "runs" / "tune") == before
