"""What a campaign measures of its variants once their runs have ended: decoding, and compiling."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mule import fsio, progress
from mule.errors import MuleError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mule.config.campaign import DecodeSection
    from mule.config.schema import Recipe
    from mule.lab.campaign import Folder, Job


def measure_decoding(jobs: Sequence[Job], folder: Folder, decode: DecodeSection) -> None:
    """decode/<variant>.json of each, of the run of its first seed; what is there stays.

    A variant that cannot be measured is told of, and the others go on.
    """
    from mule.config.load import load_recipe
    from mule.lab.decode import measure_decode

    asked = decode.model_dump()
    for job in jobs:
        file = folder.per_shape("decode", job.shape)
        if file.is_file() and fsio.read_json(file).get("asked") == asked:
            continue
        run = folder.run(job)
        trained = load_recipe(run / "resolved.yaml", []).recipe.train
        try:
            found = measure_decode(
                run,
                batches=decode.batch,
                contexts=decode.context,
                repetitions=decode.repetitions,
                precision="fp32" if trained.precision == "fp32" else "bf16",
            )
        except MuleError as error:
            progress.note(f"{job.shape}: its decoding is not measured: {error.message}", "warning")
            continue
        fsio.write_json(file, {"variant": job.variant, "size": job.size, "asked": asked, **found})


def measure_compiling(recipes: dict[Job, Recipe], folder: Folder) -> None:
    """compile/<variant>.json of each: what torch.compile costs and gains, and where it is cut.

    The updates are those of the campaign, of random rows; every way in a fresh process.
    """
    from mule.commands.bench_compile import measure_gain

    todo = {}
    for job, recipe in recipes.items():
        if (module := recipe.model.module) is not None:
            told = f"{job.shape}: compiling is not measured: a module of your own"
            progress.note(f"{told}; its graph breaks: mule lab check {module}", "warning")
        elif not folder.per_shape("compile", job.shape).is_file():
            todo[job] = recipe
    with progress.task("Measuring the compiler", total=len(todo), unit="variants") as bar:
        for job, recipe in todo.items():
            try:
                found = measure_gain(_words(recipe))
            except MuleError as error:
                told = f"{job.shape}: compiling is not measured: {error.message}"
                progress.note(told, "warning")
            else:
                file = folder.per_shape("compile", job.shape)
                fsio.write_json(file, {"variant": job.variant, "size": job.size, **found})
            bar.advance(1)


def _words(recipe: Recipe) -> list[str]:
    """What decides an update of the recipe, as words for `mule bench`."""
    import json

    from mule.config.dump import value_of
    from mule.config.knobs import knobs

    words = []
    keys = ("train.step_rows", "train.micro_batch_rows", "train.precision", "train.threads")
    for key, knob in knobs().items():
        value: Any = value_of(recipe, key)
        is_model = key.startswith("model.") and value not in (None, knob.default)
        if is_model or key in (*keys, "train.device", "data.max_seq_length"):
            words.append(f"{key}={json.dumps(value)}")
    return words
