"""Harness A, third part: what happens inside an update (F7, F8, F9) and to the data below it (F11)."""

from __future__ import annotations

import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from mule.batch import IGNORE
from mule.config.schema import OptimSection
from mule.run import Run
from mule.train.optim import Optimizer
from mule.train.step import train_step
from tests.life.harness import _STEP, RUN, TRAIN, Lab, Trial, check_clear_error, said
from tests.life.tiny_life import outcome
from tests.tiny import part, random_batch, tiny_model

KEEP = ("checkpoint.keep=1000",)  # so that every checkpoint that was saved can be looked at
# Updates quick enough to fill the window that a spike is seen against.
LONG = (
    "train.steps=140",
    "train.step_rows=2",
    "train.micro_batch_rows=2",
    "data.max_seq_length=16",
)
# Micro-batches large enough that memory tells them apart.
LARGE = (
    *("train.steps=4", "train.step_rows=8", "train.micro_batch_rows=8", "train.precision=fp32"),
    *("data.max_seq_length=128", "model.intermediate_size=2048"),
)
# So large that no row fits into what a process has left over.
HUGE = (
    *("train.steps=1", "train.step_rows=2", "train.micro_batch_rows=2", "train.precision=fp32"),
    *("data.max_seq_length=128", "model.intermediate_size=8192"),
)
_TOLERANCE = 1e-6  # relative: fp32 sums in another order
_BROKEN_AT = 14  # between the checkpoints after 12 and 16
NOT_FINITE = ("nan loss", "infinite loss", "nan gradient", "infinite gradient")

Plan = dict[str, list[int]]


# ---------------------------------------------------------------- F7: cuts of an update


def cut_otherwise(lab: Lab, full: bool) -> Iterator[Trial]:
    for seed in range(100 if full else 3):
        yield Trial(f"seed {seed}", lambda seed=seed: _cut_otherwise(seed))


def _cut_otherwise(seed: int) -> dict[str, Any]:
    """One update of the same eight rows at 8, 4, 2 and 1 at once; a row has 1 to 40 targets."""
    batch, chance = random_batch(8, 40, seed=seed), random.Random(seed)
    for row in batch.targets:
        row[chance.randint(1, 40) :] = IGNORE
    results = []
    for size in (8, 4, 2, 1):
        model = tiny_model(seed=seed)
        cuts = [part(batch, slice(i, i + size)) for i in range(0, 8, size)]
        optimizer = Optimizer(model, OptimSection())
        results.append(train_step(model, optimizer, cuts, lr=1e-3, max_grad_norm=1.0))
    whole, *cut = results
    assert all(result.num_targets == whole.num_targets for result in cut)
    loss = max(abs(result.loss - whole.loss) / whole.loss for result in cut)
    norm = max(abs(result.grad_norm - whole.grad_norm) / whole.grad_norm for result in cut)
    assert loss <= _TOLERANCE and norm <= _TOLERANCE, f"loss {loss:.1e}, gradient norm {norm:.1e}"
    return {"widest_loss_difference": loss, "widest_norm_difference": norm}


# ---------------------------------------------------------------- F8: memory runs out


def out_of_memory(lab: Lab, full: bool) -> Iterator[Trial]:
    for nth in (1, 2) if full else (1,):  # later ones find what the C library has kept from these
        yield Trial(f"no memory in update {nth}", lambda n=nth: _out_of_memory(lab, n))
    yield Trial("no room for a row", lambda: _no_room(lab))
    for nth in (1, 9, 30) if full else (9,):
        yield Trial(f"killed in update {nth}", lambda n=nth: _killed_without_a_word(lab, n))


def _out_of_memory(lab: Lab, nth: int) -> dict[str, Any]:
    """The system gives no more memory in an update: it is repeated with fewer rows at once."""
    for mebibytes in range(64, 0, -16):  # how much eight rows need differs between machines
        fault = {"call": _STEP, "nth": nth, "act": {"more_memory": mebibytes << 20}}
        with lab.folder() as folder:
            code = lab.server.run(folder, *TRAIN, *LARGE, fault=fault)
            assert code == 0, said(folder)
            halved = [e for e in Run(folder / RUN).events() if e["kind"] == "micro-batch halved"]
            if not halved:
                continue
            assert halved[0]["step"] >= nth and halved[0]["rows_before"] == 8
            text = (folder / "output.log").read_text()
            for event in halved:
                assert (
                    f"update {event['step']}: out of memory with {event['rows_before']} rows at "
                    f"once, repeated with {event['rows']}; to begin with that, set "
                    f"train.micro_batch_rows: {event['rows']}" in text
                )
            assert Run(folder / RUN).metrics()[-1]["devices"][0]["micro_batch_rows"] < 8
            widest = _widest_difference(lab, folder)
        return {"widest_loss_difference": widest, "rows_at_once": halved[-1]["rows"]}
    raise AssertionError("memory never ran out")


def _no_room(lab: Lab) -> dict[str, Any]:
    """Not even a row fits: a clear error, and with memory the run goes on."""
    fault = {"call": _STEP, "nth": 1, "act": {"more_memory": 1 << 20}}
    with lab.folder() as folder:
        code = lab.server.run(folder, *TRAIN, *HUGE, fault=fault)
        check_clear_error(folder, code)
        assert "error: out of memory: " in said(folder), said(folder)
        assert "hint: lower data.max_seq_length (now 128), set train.activation_" in said(folder)
        assert lab.server.run(folder, *TRAIN, *HUGE, "--resume") == 0, said(folder)
    return {"clear_error": True}


def _widest_difference(lab: Lab, folder: Path) -> float:
    """Relative, of any loss, to the run that had memory; each update is there once."""
    found, expected = outcome(folder / RUN)["log"], lab.reference(*LARGE)["outcome"]["log"]
    assert [(row[0], row[4]) for row in found] == [(row[0], row[4]) for row in expected]
    widest = max(abs(a[1] - b[1]) / b[1] for a, b in zip(found, expected, strict=True))
    assert widest <= _TOLERANCE, f"the losses differ by {widest:.1e}"
    return widest


def _killed_without_a_word(lab: Lab, nth: int) -> dict[str, Any]:
    """SIGKILL, as the kernel does when memory runs out: the resumed run says so."""
    fault = {"call": _STEP, "nth": nth, "act": int(signal.SIGKILL)}
    with lab.folder() as folder:
        assert lab.server.run(folder, *TRAIN, fault=fault) == -signal.SIGKILL, said(folder)
        lab.check_goes_on(folder)
        when = f"after update {nth - 1}" if nth > 1 else "before its first update"
        assert (
            f"the last attempt ended without a word {when}: killed, as the system does"
            in (folder / "output.log").read_text()
        ), said(folder)
        (event,) = (e for e in Run(folder / RUN).events() if e["kind"] == "found killed")
        assert event["step"] == nth - 1
    return {}


# ---------------------------------------------------------------- F9: NaN, infinities, spikes


def gone_wrong(lab: Lab, full: bool) -> Iterator[Trial]:
    runs = _Runs(lab)
    for at in (1, _BROKEN_AT, 16, 30) if full else (16,):
        for what in NOT_FINITE if full else NOT_FINITE[2:3]:
            yield Trial(f"{what} in update {at}", lambda w=what, a=at: _refused(runs, w, a, ()))
    for at in (129, 134, 140) if full else (134,):
        for what in ("spike", "gradient spike") if full else ("spike",):
            yield Trial(f"{what} in update {at}", lambda w=what, a=at: _refused(runs, w, a, LONG))
    for what, at in (("bad weights", _BROKEN_AT), ("bad masters", 16)):
        yield Trial(f"{what} in update {at}", lambda w=what, a=at: _rolled_back(runs, w, a))
    for seed in range(30 if full else 1):
        yield Trial(f"rolled back and killed, seed {seed}", lambda s=seed: _killed(runs, s))
    for at in range(_BROKEN_AT - 1, _BROKEN_AT + 6) if full else (_BROKEN_AT + 2,):
        yield Trial(f"rolled back and stopped in update {at}", lambda a=at: _stopped(runs, a))
    yield Trial("no end of it", lambda: _gives_up(lab))


class _Runs:
    """Poisoned runs, each made once; two of them are equal when the same updates are missing."""

    def __init__(self, lab: Lab) -> None:
        self.lab, self._found = lab, dict[str, dict[str, Any]]()

    def outcome(self, plan: Plan, *words: str) -> dict[str, Any]:
        """What a run comes to that meets this plan; `calls` are its durable calls."""
        key = repr((plan, words))
        if key not in self._found:
            with self.lab.folder() as folder:
                code = self.lab.server.run(folder, *TRAIN, *KEEP, *words, fault={"poison": plan})
                assert code == 0, said(folder)
                check_all_finite(folder / RUN)
                calls = int((folder / "durable_calls").read_text())
                self._found[key] = _without_checkpoint_names(outcome(folder / RUN)) | {
                    "calls": calls,
                    "said": (folder / "output.log").read_text(),
                    "events": Run(folder / RUN).events(),
                }
        return self._found[key]


def _without_checkpoint_names(found: dict[str, Any]) -> dict[str, Any]:
    return {key: found[key] for key in ("step", "hashes", "log", "best")}


def _check_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    different = [key for key in ("step", "hashes", "log", "best") if found[key] != expected[key]]
    assert not different, f"differs in {', '.join(different)}"


def check_all_finite(run_folder: Path) -> int:
    """No checkpoint holds a number that is not finite; how many there are."""
    checkpoints = Run(run_folder).checkpoints()
    for _, folder in checkpoints:
        for file in folder.glob("*.safetensors"):
            for name, tensor in load_file(file).items():
                assert torch.isfinite(tensor).all(), f"{folder.name}: {name} is not finite"
    return len(checkpoints)


def _refused(runs: _Runs, what: str, at: int, words: tuple[str, ...]) -> dict[str, Any]:
    """The update is as if it had never been, and the run says so."""
    found = runs.outcome({what: [at]}, *words)
    _check_same(found, runs.outcome({"left out": [at]}, *words))
    assert f"update {at} refused (" in found["said"]
    assert [e["step"] for e in found["events"] if e["kind"] == "update refused"] == [at]
    assert at not in [row[0] for row in found["log"]]
    return {"not_applied": True}


def _rolled_back(runs: _Runs, what: str, at: int) -> dict[str, Any]:
    """Broken weights are never saved: the run is one without the updates after the checkpoint."""
    end = 18 if what == "bad weights" else 16  # five refusals, or a checkpoint that is due
    found = runs.outcome({what: [at]})
    (event,) = (e for e in found["events"] if e["kind"] == "rolled back")
    assert (event["to"], event["step"]) == (12, end)
    cause = {
        18: "5 updates in a row were refused, 14 to 18",
        16: "the weights after update 16 are not finite",
    }[end]
    told = f"{cause}: went back to the weights after update 12, and on with the data after update"
    assert f"{told} {end}" in found["said"]
    _check_same(found, runs.outcome({"overflow": list(range(13, end + 1))}))
    return {"rolled_back": True}


def _killed(runs: _Runs, seed: int) -> dict[str, Any]:
    """SIGKILL before a random durable call around the rollback: the resumed run does the same."""
    plan: Plan = {"bad weights": [_BROKEN_AT]}
    expected, lab = runs.outcome(plan), runs.lab
    calls = expected["calls"]
    die_at = random.Random(seed).randrange(calls * 3 // 8, calls * 6 // 8)
    with lab.folder() as folder:
        poison = {"poison": plan}
        code = lab.server.run(folder, *TRAIN, *KEEP, die_at=die_at, fault=poison)
        assert code == -signal.SIGKILL, said(folder)
        check_all_finite(folder / RUN)
        code = lab.server.run(folder, *TRAIN, *KEEP, "--resume", fault=poison)
        assert code == 0, said(folder)
        _check_same(outcome(folder / RUN), expected)
    return {"killed": True}


def _stopped(runs: _Runs, at: int) -> dict[str, Any]:
    """SIGTERM while updates are refused: the resumed run goes back as one never stopped does."""
    plan: Plan = {"bad weights": [_BROKEN_AT]}
    expected, lab = runs.outcome(plan), runs.lab
    with lab.folder() as folder:
        # One checkpoint is kept: that of the signal must not cost the one to go back to.
        words = (*TRAIN, "checkpoint.keep=1")
        fault = {"poison": plan | {"stop": [at]}}
        assert lab.server.run(folder, *words, fault=fault) == 143, said(folder)
        check_all_finite(folder / RUN)
        assert lab.server.run(folder, *words, "--resume", fault={"poison": plan}) == 0, said(folder)
        _check_same(outcome(folder / RUN), expected)
    return {"stopped": True}


def _gives_up(lab: Lab) -> dict[str, Any]:
    """Weights that break again and again: three times back, then a clear error; resumed, the same."""
    fault = {"poison": {"bad weights": list(range(_BROKEN_AT, 40))}}
    with lab.folder() as folder:
        for words in ((), ("--resume",)):
            code = lab.server.run(folder, *TRAIN, *KEEP, "train.steps=40", *words, fault=fault)
            check_clear_error(folder, code)
            text = said(folder)
            assert (
                "error: 5 updates in a row were refused, 29 to 33, and going back has not" in text
            )
            assert "helped (after the updates 18, 23, 28) hint: look at the rows of these" in text
        back = [e for e in Run(folder / RUN).events() if e["kind"] == "rolled back"]
        assert [event["step"] for event in back] == [18, 23, 28]
        return {"checkpoints_all_finite": check_all_finite(folder / RUN)}


# ---------------------------------------------------------------- F11: data below a running run

_ROWS = "runs/.prepared/train-*/tokens.bin"


def data_disturbed(lab: Lab, full: bool) -> Iterator[Trial]:
    for label, act, check in (
        ("a row raises", {"raise": "row 7 is broken"}, _named_and_resumed),
        ("prepared rows are cut off", {"cut": _ROWS, "to": 100}, _stopped_and_made_again),
        ("the last prepared rows are cut off", {"cut": _ROWS, "by": 100}, _stopped_and_made_again),
        ("prepared rows are removed", {"remove": _ROWS}, _unharmed),
        ("the source is removed", {"remove": "text.txt"}, _unharmed),
        ("the source is cut off", {"cut": "text.txt", "to": 100}, _unharmed),
    ):
        for nth in (1, 17, 60) if full else (17,):
            fault = {"call": "mule.data.loader.make_batch", "nth": nth, "act": act}
            yield Trial(f"{label}, batch {nth}", lambda f=fault, c=check: _disturbed(lab, f, c))
    for nth in (1, 2) if full else (1,):
        yield Trial(f"preparation {nth} killed", lambda n=nth: _preparation_killed(lab, n))


def _disturbed(
    lab: Lab, fault: dict[str, Any], check: Callable[[Lab, Path, int], str]
) -> dict[str, Any]:
    with lab.folder() as folder:
        return {"ended": check(lab, folder, lab.server.run(folder, *TRAIN, fault=fault))}


def _named_and_resumed(lab: Lab, folder: Path, code: int) -> str:
    """The error stops the run, which can go on; the row is not passed over."""
    assert code == 1 and "error: ValueError: row 7 is broken" in said(folder), said(folder)
    lab.check_goes_on(folder)
    return "named error, resumed"


def _stopped_and_made_again(lab: Lab, folder: Path, code: int) -> str:
    """Nothing is saved after the cut: the system kills who reads beyond a file's end, or Mule looks
    before it saves. The resumed run makes the rows again."""
    if code == -signal.SIGBUS:
        how = "killed"
    else:
        check_clear_error(folder, code)
        how = "named error"
        assert "tokens.bin was cut to " in said(folder), said(folder)
        assert "leave prepared data alone while it is used" in said(folder), said(folder)
    lab.check_goes_on(folder)
    return f"{how}, resumed"


def _unharmed(lab: Lab, folder: Path, code: int) -> str:
    """A run keeps what it began with."""
    assert code == 0, said(folder)
    assert outcome(folder / RUN) == lab.reference()["outcome"]
    return "unharmed"


def _preparation_killed(lab: Lab, nth: int) -> dict[str, Any]:
    """SIGKILL while rows are written; `nth` of the training rows, or of the held-out ones."""
    fault = {"call": "mule.fsio._replace_folder", "nth": nth, "act": int(signal.SIGKILL)}
    with lab.folder() as folder:
        code = lab.server.run(folder, *TRAIN, fault=fault)
        assert code == -signal.SIGKILL, f"{code}: {said(folder)}"
        lab.check_goes_on(folder)
    return {"ended": "restarted"}
