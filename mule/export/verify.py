"""A GGUF file beside the model it was written from: is it the same model?

In this order, each with its own result: the file's structure, its entries, names and shapes of its
tensors, their weights; then, in llama.cpp: token ids, chat template, stop tokens, distributions and
answers. The first failure names what is wrong; the later ones are what comes of it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mule.errors import ModelError
from mule.export.dequantized import DequantizedModel
from mule.export.diagnosis import BASE, diagnose
from mule.export.limits import LIMITS, Limits, limits_of, wider
from mule.export.logits_proof import (
    ANSWER_TOKENS,
    WINDOW_TOKENS,
    FileModel,
    Reference,
    compare_answers,
    compare_logits,
    time_reference,
)
from mule.export.metadata_proof import wrong_entries
from mule.export.mixtures import TYPES
from mule.export.origin import Origin, Original, original_or_none
from mule.export.quantize import Quantizer
from mule.export.runtime_proof import (
    Message,
    check_stops,
    check_template,
    check_tokens,
)
from mule.export.stored import StoredTensors
from mule.export.verify_report import OURS, VerifyReport
from mule.export.weights_proof import Prover, wrong_tensors
from mule.generate.gguf_header import GgufHeader, read_header
from mule.generate.llamacpp import LlamaCpp, Runtime

_MAX_STARTS = 8  # beginnings of texts to continue when no prompts are given
_START_TOKENS = 16
_LEAST_ANSWER_TOKENS = 8  # for which a prompt must leave room
_EXACT = frozenset({"f32", "f16", "bf16"})
_UNKNOWN = "unknown"
_WEIGHTS_KEY = "mule.weights"  # the hash of what a file was written from
_SAME_BLOCKS = 0.999
_IN_RUNTIME = ("tokens", "template", "stops")


@dataclass(frozen=True)
class _Probe:
    """What to compare on and by which limits; `judged`: also what an untrained model guesses."""

    texts: Sequence[str]
    prompts: Sequence[list[Message]]
    rendered: bool
    limits: Limits
    judged: bool
    threads: int | None


def verify(
    gguf_file: Path | str,
    reference: Reference,
    *,
    texts: Sequence[str],
    prompts: Sequence[list[Message]] = (),
    rendered: bool = False,
    origin: Origin | None = None,
    limits: Limits | None = None,
    threads: int | None = None,
) -> VerifyReport:
    """Compare a file with `reference`, and, of what it was written from, with `origin`.

    `texts` serve for logits and perplexity: prose, or chats already `rendered` with their special
    tokens; `prompts` are chats. Without prompts the beginnings of the texts are continued instead.
    f32, f16 and bf16 files run with an exact cache, the others as a user would run them. Without
    `origin` entries, tensors and weights are not looked at. Given `limits` are kept to whatever the
    model; the type's own are not applied to what an untrained model guesses.

    A damaged file is a failed verification. Raises ModelError when there is no file, or its type has
    no limits.
    """
    started_at, file = time.perf_counter(), Path(gguf_file)
    if not file.is_file():
        raise ModelError(f"{file}: no such file", "give the path of a .gguf file")
    report = VerifyReport(str(gguf_file), _UNKNOWN, file.stat().st_size, 0.0)
    header = _header(file, report)
    if header is None:
        return report
    original = _original(origin, report)
    probe = _Probe(
        texts,
        prompts,
        rendered,
        limits or _limits(header, report.type, original),
        limits is not None,
        threads,
    )
    if origin is not None and original is not None:
        _prove_contents(header, original, origin, report)
    _Running(header, reference, original, probe, report).run()
    report.seconds = round(time.perf_counter() - started_at, 1)
    return report


def verify_contents(gguf_file: Path | str, origin: Origin) -> VerifyReport:
    """The part of `verify` that runs nothing: structure, entries, tensors and weights."""
    file = Path(gguf_file)
    report = VerifyReport(str(gguf_file), _UNKNOWN, file.stat().st_size, 0.0)
    header = _header(file, report)
    original = _original(origin, report) if header is not None else None
    if header is not None and original is not None:
        _prove_contents(header, original, origin, report)
    return report


def file_type(header: GgufHeader) -> str:
    """The name of a file's mixture of types, as `write_gguf` takes it."""
    number = header.metadata.get("general.file_type")
    names = [name for name, (_, file_type) in TYPES.items() if file_type == number]
    return names[0] if names else f"file_type {number}"


# ---------------------------------------------------------------- without running it


def _header(file: Path, report: VerifyReport) -> GgufHeader | None:
    """The header, and what it says of the file in the report; None for a damaged file."""
    try:
        header = read_header(file)
    except ModelError as error:
        report.passed("structure", [error.message.removeprefix(f"{file}: ")])
        return None
    report.type = file_type(header)
    report.bits_per_weight = round(header.bits_per_weight, 3)
    report.passed("structure", (), f"{len(header.tensors)} tensors, all in the file")
    return header


def _limits(header: GgufHeader, kind: str, original: Original | None) -> Limits:
    arch = str(header.metadata.get("general.architecture"))
    routed = bool(header.metadata.get(f"{arch}.expert_count"))
    limits = limits_of(kind, arch, routed=routed)
    if limits is None:
        raise ModelError(
            f"{header.file}: a file of {kind} has no limits of its own",
            f"give limits, or export it as one of {', '.join(TYPES)}",
        )
    if original is not None and any(original.rounding(name) for name in original.named):
        limits = wider(limits, LIMITS["bf16"])  # the merge was rounded, the adapter is not
    return limits


def _original(origin: Origin | None, report: VerifyReport) -> Original | None:
    """The model in the file's terms; None, and said so, where it cannot be written as GGUF here."""
    if origin is None:
        return None
    original = Original(origin.model_dir, origin.adapter_dir)
    try:
        _ = original.named, original.tokens
    except ModelError as error:
        for name in ("metadata", "tensors", "weights"):
            report.not_checked(name, error.message)
        return None
    return original


def _prove_contents(
    header: GgufHeader, original: Original, origin: Origin, report: VerifyReport
) -> None:
    """Entries, tensors and weights."""
    kind = report.type if report.type in TYPES else next(iter(TYPES))
    entries, plan = original.metadata(kind), original.tensors(kind)
    wrong = wrong_entries(header.metadata, entries)
    report.passed("metadata", wrong, f"{len(entries)} entries")
    stored = StoredTensors(header)
    tied = "lm_head.weight" not in original.named.values()
    wrong = wrong_tensors(stored, plan, tied=tied)
    report.passed("tensors", wrong, f"{len(plan)} names and shapes")
    shapes = {name: tensor.shape for name, tensor in plan.items()}
    if tied:
        shapes["output.weight"] = shapes["token_embd.weight"]
    same = [i.name for i in header.tensors if i.shape == shapes.get(i.name)]
    with Quantizer() as quantizer:
        prover = Prover(stored, original, _others(origin), quantizer)
        proof = prover.prove(same)
        faults = diagnose(prover, proof, origin)
    report.weights = proof.as_dict()
    faults += [] if faults else _stale(header, original, report)
    if proof.skipped:
        report.notes.append(f"weights not compared: {', '.join(proof.skipped[:3])}")
    identical = report.weights["identical_blocks"]
    share = "" if identical is None else f", {identical:.1%} of their blocks as ours"
    report.passed("weights", faults, f"{len(proof.tensors)} tensors{share}")


def _stale(header: GgufHeader, original: Original, report: VerifyReport) -> list[str]:
    """Weights so near to the model's that only the hash of what they were tells them apart."""
    told, weights = header.metadata.get(_WEIGHTS_KEY), report.weights
    identical = None if weights is None else weights["identical_blocks"]
    if told is None or identical is None or identical > _SAME_BLOCKS:
        return []
    known = original.weights_sha256()
    if known is None or known == told:
        return []
    return [
        f"stale: the file says that it was written from other weights ({str(told)[:12]}..., the "
        f"model's are {known[:12]}...), and {1 - identical:.1%} of its blocks are not theirs"
    ]


def _others(origin: Origin) -> dict[str, Original]:
    """The models whose weights a file may hold by mistake."""
    folders = {BASE: origin.base_dir} if origin.base_dir else {}
    found = {label: original_or_none(folder) for label, folder in folders.items()}
    for label, folder in origin.others.items():
        found[label] = original_or_none(folder, origin.model_dir)
    return {label: original for label, original in found.items() if original is not None}


# ---------------------------------------------------------------- running it


@dataclass(frozen=True)
class _Running:
    """What llama.cpp makes of a file; where it is not installed, our decoder with its weights."""

    header: GgufHeader
    reference: Reference
    original: Original | None
    probe: _Probe
    report: VerifyReport

    def run(self) -> None:
        tokenizer, probe = self.reference.tokenizer, self.probe
        encoded = [tokenizer.encode(text, special=probe.rendered) for text in probe.texts]
        starts = self._starts(encoded)
        self.reference.logits(starts[0] if starts else [0])  # a fault of the model is none here
        room = max([WINDOW_TOKENS, *(len(ids) + ANSWER_TOKENS for ids in starts)])
        exact = self.report.type in _EXACT
        file = self.header.file
        try:
            with LlamaCpp(file, n_ctx=room, threads=probe.threads, exact=exact) as model:
                check_tokens(model, tokenizer, probe.texts, self.report)
                check_template(model, tokenizer, probe.prompts, self.report)
                check_stops(model, tokenizer, self.report)
                self._compute(model, encoded, starts)
        except ModelError as error:
            why = _absent()
            if why:
                self._stand_in(encoded, starts, why)
            else:
                self.report.passed("runtime", [error.message.removeprefix(f"{file}: ")])

    def _stand_in(self, encoded: list[list[int]], starts: list[list[int]], why: str) -> None:
        report = self.report
        if self.original is None:
            raise ModelError(
                f"{self.header.file}: cannot be run: {why}",
                "install the runtime (pip install xllamacpp), or name the model it was written from",
            )
        report.runtime = OURS
        report.tokens_equal = report.stops = None
        for name in _IN_RUNTIME:
            report.not_checked(name, f"llama.cpp is not installed here: {why}")
        stored = StoredTensors(self.header)
        try:
            model = DequantizedModel(stored, self.original)
        except ModelError as error:
            report.passed("distributions", [error.message])
            return
        self._compute(model, encoded, starts)

    def _compute(self, model: FileModel, encoded: list[list[int]], starts: list[list[int]]) -> None:
        probe, report, context = self.probe, self.report, self._context
        compare_logits(
            model,
            self.reference,
            encoded,
            probe.limits,
            report,
            context=context,
            judged=probe.judged,
        )
        if not math.isfinite(report.kl_mean) and report.num_tokens == 0:
            return  # of another vocabulary
        compare_answers(model, self.reference, starts, probe.limits, report, context=context)
        if starts:
            time_reference(self.reference, starts[0], report)

    def _starts(self, encoded: list[list[int]]) -> list[list[int]]:
        """The prompts as ids; else the beginnings of the texts."""
        if not self.probe.prompts:
            return [ids[:_START_TOKENS] for ids in encoded if ids][:_MAX_STARTS]
        prompts = [self.reference.tokenizer.encode_prompt(chat) for chat in self.probe.prompts]
        return [ids for ids in prompts if len(ids) + _LEAST_ANSWER_TOKENS <= self._context]

    @property
    def _context(self) -> int:
        arch = self.header.metadata.get("general.architecture")
        length = self.header.metadata.get(f"{arch}.context_length")
        return length if isinstance(length, int) and length > 0 else WINDOW_TOKENS


def _absent() -> str:
    """Why llama.cpp cannot run here at all; "" where it can."""
    try:
        Runtime("llama.cpp").close()
    except ModelError as error:
        return error.message
    return ""
