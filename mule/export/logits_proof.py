"""A file's next-token distributions and greedy answers beside the model's."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from mule import progress
from mule.errors import UserError
from mule.export.limits import Limits
from mule.export.measure import LogitFigures, windows
from mule.export.runtime_proof import ReferenceTokenizer, shown
from mule.export.verify_report import Check, VerifyReport

WINDOW_TOKENS = 512
ANSWER_TOKENS = 64
_MAX_TOKENS = 4096  # over all texts: llama.cpp scores some hundred a second on two cores
_ANSWERS_SECONDS = 90.0  # no prompt is begun after it
_TIMED_TOKENS = 16  # of the reference: it computes in fp32, several times slower
# From this share of the entropy of guessing on a model is untrained. Measured: random weights 0.96,
# models of 2M after 300 updates 0.3 to 0.4.
_GUESSING = 0.85


class Reference(Protocol):
    """The model the file was written from, in float32."""

    @property
    def tokenizer(self) -> ReferenceTokenizer: ...

    def logits(self, ids: list[int]) -> npt.NDArray[np.float32]:
        """Logits (n, vocab) after each of `ids`."""
        ...

    def greedy(self, ids: list[int], max_tokens: int) -> list[int]:
        """The most probable continuation, without the stop token that ended it."""
        ...


class FileModel(Protocol):
    """What computes with the file: LlamaCpp, or our own decoder holding the file's weights."""

    num_tokens: int
    bos_id: int | None
    add_bos: bool
    reason: str
    stop_id: int | None

    def logits(self, ids: Sequence[int]) -> npt.NDArray[np.float32]: ...
    def generate(self, ids: Sequence[int], *, max_tokens: int) -> Iterator[int]: ...


def compare_logits(
    model: FileModel,
    reference: Reference,
    encoded: list[list[int]],
    limits: Limits,
    report: VerifyReport,
    *,
    context: int,
    judged: bool = True,
) -> None:
    """KL, top-1 and perplexity over windows of the texts.

    Where the model guesses, as random weights do, a type without limits on single logits is judged
    only if it must be (`judged`): its blocks exaggerate there.
    """
    figures = _measured(model, reference, encoded, report, context)
    if figures is None:
        return
    report.num_tokens = figures.num_tokens
    for name in ("kl_mean", "kl_p99", "top1", "max_abs_logit", "ppl_reference", "ppl"):
        setattr(report, name, getattr(figures, name))
    report.uniformity = figures.uniformity
    report.trained = figures.uniformity < _GUESSING
    if not report.trained and limits.greedy_margin is None and not judged:
        report.not_checked(
            "distributions",
            f"the model is untrained: its predictions have {figures.uniformity:.0%} of the entropy of "
            "guessing, so what quantising does to them says nothing",
        )
        return
    beyond = list(_beyond(figures, limits, explained=not report.ok))
    report.failures += beyond
    told = f"{figures.num_tokens:,} tokens, mean KL {figures.kl_mean:.2g} nats"
    report.checks.append(Check("distributions", not beyond, beyond[0] if beyond else told))


def _measured(
    model: FileModel,
    reference: Reference,
    encoded: list[list[int]],
    report: VerifyReport,
    context: int,
) -> LogitFigures | None:
    first = [model.bos_id] if model.add_bos and model.bos_id is not None else []
    chosen = windows(encoded, first, min(WINDOW_TOKENS, context), _MAX_TOKENS)
    if not chosen:
        raise UserError("no text to compare on", "give a text of at least two tokens")
    figures = LogitFigures()
    with progress.task("Comparing logits", total=sum(map(len, chosen)), unit="tokens") as bar:
        for ids in chosen:
            expected = reference.logits(ids)
            if expected.shape != (len(ids), model.num_tokens):
                counts = f"{model.num_tokens} tokens in the file, {expected.shape[1]} in the model"
                report.passed("vocabulary", [counts])
                return None
            figures.add(ids, expected, model.logits(ids))
            bar.advance(len(ids))
    return figures


def _beyond(figures: LogitFigures, limits: Limits, *, explained: bool) -> Iterator[str]:
    """What is beyond its limit; written so that NaN is. `explained`: a cause was named before."""
    if not figures.kl_mean <= limits.kl_mean:
        why = "" if explained else _suspicion(figures, limits)
        yield f"kl_mean: {figures.kl_mean:.3g} nats, at most {limits.kl_mean:.3g}{why}"
    if not figures.kl_p99 <= limits.kl_p99:
        yield f"kl_p99: {figures.kl_p99:.3g} nats, at most {limits.kl_p99:.3g}"
    if not figures.ppl <= figures.ppl_reference * (1 + limits.ppl):
        yield (
            f"ppl: {figures.ppl:.4g} where the model has {figures.ppl_reference:.4g}, "
            f"at most {100 * limits.ppl:g}% more"
        )
    if limits.logit is not None:
        most = max(limits.logit, 1e-4 * figures.largest_logit)
        if not figures.max_abs_logit <= most:
            yield f"max_abs_logit: {figures.max_abs_logit:.3g}, at most {most:.3g}"


def _suspicion(figures: LogitFigures, limits: Limits) -> str:
    """What a large divergence points to; attention has no effect on the first token of a window."""
    if not figures.kl_mean > 3 * limits.kl_mean:
        return ""
    if figures.kl_first_mean <= max(limits.kl_mean, 0.1 * figures.kl_mean):
        return "; the first tokens agree, so it is attention: RoPE base, order of the q and k rows"
    return "; already the first tokens differ: other weights, norms or head"


# ---------------------------------------------------------------- answers


def compare_answers(
    model: FileModel,
    reference: Reference,
    starts: list[list[int]],
    limits: Limits,
    report: VerifyReport,
    *,
    context: int,
) -> None:
    """Greedy answers of the file, and what the model would have chosen at each of their tokens.

    So the model reads each answer at once, and writes none. Where they part, the model's lead for
    its own token is kept. Prompt and answer together are at most `context` tokens.
    """
    wrong_stops: list[str] = []
    seconds, count, began_at = 0.0, 0, time.perf_counter()
    with progress.task("Comparing answers", total=len(starts), unit="prompts") as bar:
        for ids in starts:
            if report.num_prompts and time.perf_counter() - began_at > _ANSWERS_SECONDS:
                break
            started_at = time.perf_counter()
            room = min(ANSWER_TOKENS, context - len(ids))
            found = list(model.generate(ids, max_tokens=room))
            seconds += time.perf_counter() - started_at
            count += len(found) + (model.reason == "stop")
            report.num_prompts += 1
            wrong_stops += _judge_answer(model, reference, ids, found, report)
            bar.advance()
    if report.num_prompts < len(starts):
        asked = f"{report.num_prompts} of {len(starts)} prompts were asked"
        report.notes.append(f"{asked}: {_ANSWERS_SECONDS:.0f} seconds were over")
    report.tokens_per_second = count / seconds if seconds else report.tokens_per_second
    failures = list(dict.fromkeys(wrong_stops))
    if failures:
        report.stops = False
        report.passed("stops", failures)
    worst = max(report.greedy_margins, default=0.0)
    failures = []
    if limits.greedy_margin is not None and not worst <= limits.greedy_margin:
        failures.append(
            f"an answer parts where the model preferred its token by {worst:.3g} "
            f"in logits, at most {limits.greedy_margin:.3g}"
        )
    told = f"the same on {report.num_greedy_equal} of {report.num_prompts}"
    report.passed("greedy", failures, told)


def _judge_answer(
    model: FileModel, reference: Reference, ids: list[int], found: list[int], report: VerifyReport
) -> Iterator[str]:
    """Count one answer; yield what is wrong with where it stops."""
    tokenizer = reference.tokenizer
    rows = reference.logits([*ids, *found])[len(ids) - 1 :, : tokenizer.vocab_size]
    ended = [] if model.stop_id is None or model.reason != "stop" else [model.stop_id]
    for place, token in enumerate([*found, *ended]):
        wanted = int(rows[place].argmax())
        stops = place == len(found)
        if token != wanted and not (stops and wanted in tokenizer.stop_ids):
            report.greedy_margins.append(float(rows[place, wanted] - rows[place, token]))
            return
        if token in tokenizer.stop_ids and not stops:
            yield f"the file goes on after {shown(tokenizer, token)}"
            return
        if stops and token not in tokenizer.stop_ids:
            yield f"the file stops at {shown(tokenizer, token)}, the model goes on"
            return
    report.num_greedy_equal += 1


def time_reference(reference: Reference, ids: list[int], report: VerifyReport) -> None:
    """Tokens a second of the model itself, on one short answer."""
    started_at = time.perf_counter()
    answer = reference.greedy(ids, _TIMED_TOKENS)
    seconds = time.perf_counter() - started_at
    report.reference_tokens_per_second = (len(answer) or 1) / max(seconds, 1e-9)
