"""`mule plan`: will it fit, how long will it take, and what to change; without torch where it can."""

from __future__ import annotations

import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mule.errors import ConfigError, UserError

if TYPE_CHECKING:
    from mule.commands.assume import Assumed
    from mule.config.schema import Recipe
    from mule.plan.data_rows import DataRows
    from mule.plan.estimate import Estimate, Hardware, Sources
    from mule.plan.resolve import Facts
    from mule.plan.subject import Base, Words

_PRICE = re.compile(r"(?P<price>\d+(\.\d+)?)(/h)?")
_BYTES_A_TOKEN, _CHAT_TOKENS, _ANSWER_SHARE = 4.0, 200, 0.4  # where there is no tokenizer to count


def run(
    recipe_file: Path | None,
    overrides: list[str],
    *,
    root: Path = Path("runs"),
    name: str | None = None,
    machine: str | None = None,
    price: str | None = None,
    watts: float | None = None,
    fresh: bool = False,
    assume: bool = False,
    typed: list[str] | None = None,
) -> dict[str, Any]:
    """What the run of a recipe will take on this machine, or on a named one.

    A campaign gets what `mule lab run --dry-run` says of it. `fresh` measures this machine again.
    With `assume` there is no recipe: a model and its data, and what `mule train` assumes of them.
    `typed` are the words of the same run for `mule train`, where they are not the overrides.
    """
    from mule.config.load import load_recipe

    if (campaign := _campaign(recipe_file)) is not None:
        return _of_campaign(campaign, overrides, machine)
    price_an_hour = _price(price)
    assumed = assumptions(overrides, name, machine) if assume else None
    loaded = load_recipe(recipe_file, overrides, assumed=assumed)
    run_name = name or loaded.recipe.name or (recipe_file.stem if recipe_file else "run")
    plan = Plan(_with_own_rows(loaded.recipe), root / run_name, machine, fresh)
    found = plan.estimate()
    changes = plan.remedies(found)
    result = {**_told(found, plan), **_bill(found, plan, price_an_hour, watts), "remedies": changes}
    result["forecast"] = _forecast(found.resolved.recipe, plan, root)
    words = typed or [*([str(recipe_file)] if recipe_file else []), *overrides]
    return result | {"next": _next(result, words, name)}


class Plan:
    """The parts of one estimate, in the order in which they are found."""

    def __init__(self, recipe: Recipe, folder: Path, machine: str | None, fresh: bool) -> None:
        from mule.plan.fitted import fitted
        from mule.plan.subject import base_model, model_config, words_of

        self.recipe, self.folder, self.fitted = recipe, folder, fitted()
        self.notes: list[str] = []
        self.base: Base | None = base_model(recipe)
        self.words: Words | None = words_of(recipe, self.base, folder)
        self.config = model_config(recipe, self.base, self.words)
        self._check_length()
        self.rows = self._rows()
        self.hardware, self.facts = self._machine(machine, fresh)

    def estimate(self) -> Estimate:
        from mule.plan.estimate import estimate
        from mule.plan.resolve import resolve

        resolved = resolve(self.recipe, self.config, self.facts)
        return estimate(
            self.config, resolved, self.facts, self.hardware, self.sources(), fitted=self.fitted
        )

    def sources(self) -> Sources:
        """What is left to do before the first update."""
        from mule.plan.estimate import Sources

        words = self.words
        return Sources(
            kind=self.rows.kind,
            num_bytes=self.rows.num_bytes,
            num_tokens=self.rows.num_rows * self.rows.row_length,
            is_prepared=self.rows.is_prepared,
            trains_tokenizer=bool(words and words.is_to_be_trained),
            download_bytes=self.base.download_bytes if self.base else 0,
        )

    def remedies(self, found: Estimate) -> list[dict[str, Any]]:
        """What to change where it does not fit well, as rows."""
        from mule.plan.remedies import remedies

        if found.verdict == "fits":
            return []
        listed = remedies(
            self.config,
            found.resolved.recipe,
            self.facts,
            self.hardware.process,
            self.fitted,
            free_bytes=self.hardware.free_bytes,
        )
        if not listed:
            self.notes.append("no setting of this recipe makes it noticeably smaller")
        return [
            {
                "set": " ".join(each.words),
                "harm": each.harm,
                "memory_bytes": each.needed_bytes,
                "verdict": each.verdict,
            }
            for each in listed
        ]

    def _rows(self) -> DataRows:
        from mule.plan.data_rows import data_rows

        if self.words is None:
            self.notes.append(
                "the tokenizer was not fetched yet: tokens are guessed at "
                f"{_BYTES_A_TOKEN:g} bytes each"
            )
            return _guessed(self.recipe)
        found = data_rows(
            self.recipe, self.words.tokenizer, self.folder.parent, is_own=self.words.is_own
        )
        if not found.is_exact:
            self.notes.append(f"rows and tokens are estimated: {found.how}")
        if not self.words.is_own:
            self.notes.append(f"the tokenizer is {self.words.origin}")
        return found

    def _machine(self, name: str | None, fresh: bool) -> tuple[Hardware, Facts]:
        from mule import calibration
        from mule.plan import hardware, machines

        train, size = self.recipe.train, self.config.vocab_size
        if name is not None:
            named = machines.named_machine(name)
            precision = train.precision
            if precision == "auto":
                precision = "fp32" if named.kind == "cpu" else "bf16"
            found = hardware.other_machine(named, self.fitted, precision, size)
            facts = hardware.facts_there(self.rows, named, self.recipe, found)
            self.notes.append("this machine was not measured: published rates, assumed shares")
            return found, facts
        known = calibration.calibration(fresh=fresh)
        if train.device == "cpu" and known.device != "cpu":
            known = _on_processor(known)
        disk = calibration.disk(self.folder)
        precision = known.precision if train.precision == "auto" else train.precision
        found = hardware.this_machine(known, disk, self.folder, self.fitted, precision, size)
        if found.device == "cpu" and train.threads != "auto":
            found = hardware.with_threads(found, train.threads)
        return found, hardware.facts_here(self.rows, known, self.recipe, found)

    def _check_length(self) -> None:
        length, most = self.recipe.data.max_seq_length, self.config.max_position_embeddings
        if length > most:
            raise ConfigError(
                [f"data.max_seq_length = {length} exceeds the model's context of {most} tokens"],
                f"set data.max_seq_length to {most} or less",
            )


def _on_processor(known: Any) -> Any:
    """The same machine without its GPU."""
    from mule import machine

    threads = machine.physical_cores()
    fast = machine.has_fast_bf16()
    kinds = ("fp32", "bf16") if fast else ("fp32",)
    return replace(
        known,
        device="cpu",
        device_name=machine.cpu_model(),
        device_bytes=0,
        precision="bf16" if fast else "fp32",
        matmul_flops={kind: machine.matmul_peak(kind, "cpu", threads) for kind in kinds},
        read_bytes_per_second=machine.read_bandwidth("cpu", threads),
    )


def _with_own_rows(recipe: Recipe) -> Recipe:
    from mule.plan.mlx import one_chat_a_row

    return one_chat_a_row(recipe)


def _guessed(recipe: Recipe) -> DataRows:
    """Rows by the size of the files alone."""
    from mule.data.sources import detect, expand
    from mule.data.sources.detect import TEXT_FORMATS
    from mule.plan.data_rows import DataRows

    files, length = expand(recipe.data.train), recipe.data.max_seq_length
    size = sum(file.stat().st_size for file in files)
    tokens = max(1.0, size / _BYTES_A_TOKEN)
    is_text = detect(files[0], max_rows=50) in TEXT_FORMATS
    rows = max(1, round(tokens / length))
    return DataRows(
        kind="text" if is_text else "chat",
        num_rows=rows,
        row_length=length,
        targets_per_row=length * (1.0 if is_text else _ANSWER_SHARE),
        examples_per_row=1.0 if is_text else max(1.0, length / _CHAT_TOKENS),
        num_items=max(1, round(tokens / _CHAT_TOKENS)),
        isolated=not is_text,
        num_valid_rows=max(1, rows // 50),
        num_bytes=size,
        how=f"guessed at {_BYTES_A_TOKEN:g} bytes a token",
    )


# ---------------------------------------------------------------- the result


def _told(found: Estimate, plan: Plan) -> dict[str, Any]:
    """The estimate as it is printed and as JSON."""
    from mule.config.dump import value_of

    recipe = found.resolved.recipe
    disk_free = plan.hardware.free_disk_bytes
    short = disk_free is not None and found.disk_bytes > disk_free
    if recipe.evaluate.patience:
        plan.notes.append("evaluate.patience may end the run earlier: the time is the longest")
    if plan.base is not None and plan.base.folder is None:
        plan.notes.append(f"the model is {plan.base.origin}: fetching it is not in the time")
    chosen = ("micro_batch_rows", "activation_checkpointing", "precision", "compile", "sharding")
    return {
        "verdict": found.verdict,
        "machine": plan.hardware.name,
        "calibrated": plan.hardware.is_calibrated,
        "basis": plan.hardware.basis,
        "memory_bytes": found.peak.total,
        "free_bytes": found.free_bytes,
        "memory": found.peak.parts,
        "peak_in": found.peak.phase,
        "phases": found.peak.phases,
        "disk_bytes": found.disk_bytes,
        "free_disk_bytes": disk_free,
        "disk": found.disk,
        "disk_fits": not short,
        "counts": found.counts,
        "seconds_total": found.total_s,
        "seconds": found.seconds,
        "update_s": found.update_s,
        "tokens_per_second": found.counts["tokens_an_update"] / found.update_s,
        "share_of_peak": found.share_of_peak,
        "update_by_kind_of_work": found.kinds,
        "settings": {f"train.{key}": getattr(recipe.train, key) for key in chosen},
        "reasons": found.resolved.reasons,
        "decided": {key: value_of(recipe, key) for key in found.resolved.reasons},
        "rows_known_by": plan.rows.how,
        "notes": plan.notes,
        "ok": found.verdict != "does not fit" and not short,
    }


def _forecast(recipe: Recipe, plan: Plan, root: Path) -> dict[str, Any]:
    """The validation loss at milestones, from the finished runs that compare with this one."""
    from mule.plan.forecast_before import forecast_before
    from mule.run import list_runs

    return forecast_before(recipe, plan.config, list_runs(root)).as_dict()


def _bill(
    found: Estimate, plan: Plan, price_an_hour: float | None, watts: float | None
) -> dict[str, Any]:
    from mule.plan.estimate import bill

    hardware = plan.hardware if watts is None else replace(plan.hardware, watts=watts)
    return bill(found, hardware, price_an_hour)


def _price(text: str | None) -> float | None:
    if text is None:
        return None
    found = _PRICE.fullmatch(text.strip())
    if found is None:
        raise UserError(
            f"--price {text}: not a price of an hour",
            "give a number: --price 1.20/h, of one device",
        )
    return float(found["price"])


def _campaign(file: Path | None) -> Path | None:
    """The file when it is a campaign, by its own name or that of one that comes with Mule."""
    from mule.config.presets import campaign_file, is_campaign

    if file is None:
        return None
    if file.is_file():
        return file if is_campaign(file) else None
    return campaign_file(str(file))


def _of_campaign(file: Path, overrides: list[str], machine: str | None) -> dict[str, Any]:
    from mule.commands import lab_run

    if machine is not None:
        raise UserError(
            "--machine cannot be combined with a campaign: its times are those of runs made here",
            "plan one of its variants as a recipe: mule plan RECIPE --machine NAME",
        )
    found = lab_run.run(file, overrides, dry_run=True)
    return {"ok": True, **found}


def _next(result: dict[str, Any], words: list[str], name: str | None) -> str:
    """To train; or to plan with the first change that is enough."""
    enough = [row["set"] for row in result["remedies"] if row["verdict"] == "fits"]
    named = ["--name", name] if name else []
    if result["verdict"] == "does not fit" and enough:
        return shlex.join(["mule", "plan", *words, *enough[0].split(), *named])
    return shlex.join(["mule", "train", *words, *named])


def assumptions(overrides: list[str], name: str | None, machine: str | None) -> Assumed:
    """What `mule train` assumes of a model and its data, without fetching weights."""
    from mule import calibration
    from mule.commands import assume
    from mule.plan.machines import named_machine
    from mule.plan.subject import base_model, words_of

    called = name or assume.name_of(overrides)
    recipe = assume.begun(overrides)
    base = base_model(recipe)
    assert base is not None
    kind = named_machine(machine).kind if machine else calibration.calibration().device
    words = words_of(recipe, base, Path("runs") / called)
    tokenizer = words.tokenizer if words else None
    found = assume.name_and_adapter(overrides, called) | assume.fitting(
        recipe, base.config, lambda: tokenizer, has_gpu=kind != "cpu"
    )
    assume.tell(found)
    return found
