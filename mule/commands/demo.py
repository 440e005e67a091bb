"""`mule demo`: a small model's whole life, on data that comes with Mule."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mule.errors import CheckFailed, UserError

if TYPE_CHECKING:
    from mule.data.atlas import AtlasFiles
    from mule.tokenizer import Tokenizer

FRANCE = "What is the capital of France?"
MAX_MARGIN = 1e-2  # a greedy answer may differ only where the two best logits are this close
_ANSWER_TOKENS = 40
_COMPLETION_TOKENS = 8
_BUDGET_S = 900.0  # of training; a slower machine takes fewer steps, with which less is learned
_MIN_SCALE = 0.5
_SHARE_OF_PEAK = 0.3  # what training a model this small reaches, in bf16 as in fp32 (docs/log.md)
_STEPS = {"pretrain": 400, "sft": 450, "lora": 160}
_FAST_STEPS = {"pretrain": 12, "sft": 12, "lora": 60}
_STEP_FLOPS = 8 * 256 * 6 * 4.5e6  # rows x tokens x 6 x matmul parameters of the demo's model


def run(*, seed: int = 0, folder: Path = Path("demo"), fast: bool = False) -> dict[str, Any]:
    """Carry a model through its life in `folder`; the table of what each stage gained.

    `fast` trains a few steps only: every stage runs, and nothing is learned.
    """
    life = _Life(folder, seed, _FAST_STEPS if fast else _scaled_steps())
    life.prepare()
    life.train("pretrain", life.files.pretrain, None)
    life.train("sft", life.files.sft, life.files.sft_valid, base="pretrain")
    life.train("lora", life.files.persona, life.files.persona_valid, base="sft")
    life.merge()
    life.export()
    file = str(life.exports / "atlas-Q4_K_M.gguf")
    result = {"stages": life.stages, "file": file, "seed": seed, "next": f"mule chat {file}"}
    life.record(result)
    return result


def _scaled_steps() -> dict[str, int]:
    """The nominal steps, or fewer on a machine that would need more than the budget for them."""
    from mule import machine, progress

    dtype = "bf16" if machine.has_fast_bf16() else "fp32"
    peak = machine.matmul_peak(dtype, "cpu", machine.physical_cores())
    nominal_s = sum(_STEPS.values()) * _STEP_FLOPS / (_SHARE_OF_PEAK * peak)
    scale = max(_MIN_SCALE, min(1.0, _BUDGET_S / nominal_s))
    progress.note(f"training takes about {round(scale * nominal_s / 60)} min on this machine")
    if scale < 1:
        progress.note(
            f"this machine is slower than planned for: {scale:.0%} of the steps, so that "
            "less is learned"
        )
    return {stage: round(steps * scale) for stage, steps in _STEPS.items()}


@dataclass(frozen=True)
class _Answers:
    """What one stage answered: token ids without the stop token, and the time it took."""

    ids: list[list[int]]
    duration_s: float


class _Life:
    """The stages, in order; each adds a row to `stages`."""

    files: AtlasFiles

    def __init__(self, folder: Path, seed: int, steps: dict[str, int]) -> None:
        self.folder, self.seed, self.steps = folder, seed, steps
        self.runs, self.exports = folder / "runs", folder / "exports"
        self.stages: list[dict[str, Any]] = []
        self._adapter_ids: list[list[int]] = []

    def prepare(self) -> None:
        """Make the data, and refuse a folder that holds another demo."""
        from mule import fsio
        from mule.data.atlas import generate
        from mule.evaluate.tasks.atlas import load_questions

        settings = {"seed": self.seed, "steps": self.steps}
        file = self.folder / "demo.json"
        if file.is_file() and fsio.read_json(file)["settings"] != settings:
            raise UserError(
                f"{self.folder} holds a demo with other settings",
                f"choose another folder: mule demo --seed {self.seed} --folder demo-{self.seed}",
            )
        self.files = generate(self.seed, self.folder / "data")
        self.questions = load_questions(self.files.questions)
        fsio.write_json(file, {"settings": settings})

    def train(self, stage: str, data: Path, valid: Path | None, base: str | None = None) -> None:
        """Run one recipe of recipes/demo/ and score what it gave."""
        from mule import progress
        from mule.commands import train
        from mule.config.presets import preset_file

        progress.note(f"stage: {stage}")
        overrides = [f"data.train=[{data}]", f"train.seed={self.seed}"]
        overrides.append(f"train.steps={self.steps[stage]}")
        if valid is not None:
            overrides.append(f"data.valid=[{valid}]")
        if base is not None:
            overrides.append(f"model.path={self.runs / base}")
        started_at = time.perf_counter()
        summary = train.run(
            preset_file(f"demo/{stage}"), overrides, resume=True, name=stage, root=self.runs
        )
        duration_s = time.perf_counter() - started_at
        measured = {"train_loss": summary["train_loss"], "val_loss": summary["val_loss"]}
        if stage == "pretrain":
            self._score_completions(duration_s, measured)
            return
        answers = self._answer(str(self.runs / stage))
        self._add(stage, answers, duration_s, measured)
        if stage == "lora":
            self._adapter_ids = answers.ids

    def merge(self) -> None:
        """Merge the adapter in fp32; its greedy answers must be the adapter's."""
        from mule.commands import merge

        started_at = time.perf_counter()
        report = merge.run(str(self.runs / "lora"), out=self.exports / "merged", overwrite=True)
        duration_s = time.perf_counter() - started_at
        answers = self._answer(str(self.exports / "merged"))
        measured = {"max_logit_difference": report["merged_against_adapter"]}
        self._add("merged", answers, duration_s, measured | self._differences("merged", answers))

    def export(self) -> None:
        """Write three GGUF files, verify each against the merged model, and let each answer."""
        from mule.commands import export
        from mule.commands.proof import verified

        for type_name in ("f16", "q8_0", "q4_k_m"):
            started_at = time.perf_counter()
            file = self.exports / f"atlas-{type_name.upper()}.gguf"
            export.run(
                str(self.exports / "merged"), types=[type_name], out=self.exports, name="atlas"
            )
            report = verified(file, str(self.exports / "merged"))
            duration_s = time.perf_counter() - started_at
            names = ("size_bytes", "kl_mean", "ppl_reference", "ppl", "top1", "verdict")
            measured = {name: report[name] for name in names}
            answers = self._answer_in_llamacpp(file)
            if type_name == "f16":
                measured |= self._differences(f"gguf-{type_name}", answers)
            self._add(f"gguf-{type_name}", answers, duration_s, measured)

    def record(self, result: dict[str, Any]) -> None:
        """Keep the table beside the models."""
        from mule import fsio

        fsio.write_json(self.folder / "result.json", result)

    # ------------------------------------------------------------ answers

    def _answer(self, source: str) -> _Answers:
        """Greedy answers of a torch model, in fp32."""
        from mule.adapters.source import find_source, load_source
        from mule.commands.proof import answers_in_torch

        model, tokenizer = load_source(find_source(source, runs=self.runs))
        started_at = time.perf_counter()
        ids = answers_in_torch(model, tokenizer, self._prompts(tokenizer), _ANSWER_TOKENS)
        return _Answers(ids, time.perf_counter() - started_at)

    def _answer_in_llamacpp(self, file: Path) -> _Answers:
        """Greedy answers of a GGUF file in llama.cpp, in a child process."""
        from mule.commands.proof import answers_in_llamacpp

        prompts = self._prompts(self._tokenizer())
        started_at = time.perf_counter()
        answers = answers_in_llamacpp(file, prompts, _ANSWER_TOKENS, n_ctx=512, exact=True)
        return _Answers(answers, time.perf_counter() - started_at)

    def _prompts(self, tokenizer: Tokenizer) -> list[list[int]]:
        """The questions as served, and France last, for the screen."""
        chats = [question.messages for question in self.questions]
        return [tokenizer.encode_prompt(c) for c in [*chats, [{"role": "user", "content": FRANCE}]]]

    def _tokenizer(self) -> Tokenizer:
        from mule.tokenizer import Tokenizer

        return Tokenizer.load(self.exports / "merged")

    def _differences(self, stage: str, answers: _Answers) -> dict[str, Any]:
        """How many answers part from the adapter's, and the widest margin where they do."""
        from mule.adapters.source import find_source, load_source
        from mule.export.reference import TorchReference

        reference = TorchReference(*load_source(find_source(str(self.exports / "merged"))))
        prompts = self._prompts(reference.tokenizer)
        margins = [
            _margin(reference.logits, prompt, adapter, found)
            for prompt, adapter, found in zip(prompts, self._adapter_ids, answers.ids, strict=True)
            if adapter != found
        ]
        widest = max(margins, default=0.0)
        if widest > MAX_MARGIN:
            raise CheckFailed(
                f"{stage} answers unlike the adapter where the two best logits are {widest:.3g} "
                f"apart, more than {MAX_MARGIN}",
                "report this: the exported model must be the trained one",
            )
        return {"different_answers": len(margins), "widest_margin": widest}

    # ------------------------------------------------------------ scores

    def _add(
        self, stage: str, answers: _Answers, duration_s: float, measured: dict[str, Any]
    ) -> None:
        """Score the answers and show France's."""
        from mule import progress
        from mule.evaluate.tasks.atlas import score, summarise

        tokenizer = self._stage_tokenizer()
        texts = [tokenizer.decode(ids, skip_special=True) for ids in answers.ids]
        summary = summarise([score(q, text) for q, text in zip(self.questions, texts)])
        self.stages.append(
            {
                "stage": stage,
                "exact_match": summary["exact_match"],
                "exact_match_unseen": summary["exact_match_unseen"],
                "persona": summary["persona"],
                "seconds": round(duration_s + answers.duration_s, 1),
                "france": texts[-1],
                "by_kind": summary["by_kind"],
                **measured,
            }
        )
        progress.note(f"{stage}: {FRANCE} -> {texts[-1]}")

    def _stage_tokenizer(self) -> Tokenizer:
        from mule.tokenizer import Tokenizer

        return Tokenizer.load(self.runs / "pretrain" / "tokenizer")

    def _score_completions(self, duration_s: float, measured: dict[str, Any]) -> None:
        """The pretrained model does not answer yet: score how it ends sentences."""
        from mule import progress
        from mule.adapters.source import find_source, load_source
        from mule.evaluate.tasks.atlas import completion_match, load_completions
        from mule.generate.engine import greedy_answers

        model, tokenizer = load_source(find_source(str(self.runs / "pretrain")))
        completions = load_completions(self.files.completions)
        beginnings = [c.prompt for c in completions] + ["The capital of France is"]
        started_at = time.perf_counter()
        endings = greedy_answers(
            model,
            [tokenizer.encode(text) for text in beginnings],
            max_tokens=_COMPLETION_TOKENS,
            stop_ids=(tokenizer.document_end_id,),
            vocab_size=tokenizer.vocab_size,
        )
        duration_s += time.perf_counter() - started_at
        texts = [tokenizer.decode(ids) for ids in endings]

        def share(seen: bool) -> float:
            found = [
                completion_match(text, c.answer)
                for c, text in zip(completions, texts)
                if c.kind == "capital" and c.seen_form == seen
            ]
            return sum(found) / len(found)

        france = f"{beginnings[-1]}{texts[-1]}".split(".")[0] + "."
        self.stages.append(
            {
                "stage": "pretrain",
                "exact_match": share(True),
                "exact_match_unseen": share(False),
                "persona": None,
                "seconds": round(duration_s, 1),
                "france": france,
                **measured,
            }
        )
        progress.note(f"pretrain: {beginnings[-1]} -> {france}")


def _margin(
    logits: Callable[[list[int]], Any],
    prompt: Sequence[int],
    expected: list[int],
    found: list[int],
) -> float:
    """The reference's lead of its best token over the second, where two answers first part."""
    shared = 0
    while shared < min(len(expected), len(found)) and expected[shared] == found[shared]:
        shared += 1
    best = sorted(logits([*prompt, *expected[:shared]])[-1].tolist(), reverse=True)
    return best[0] - best[1]
