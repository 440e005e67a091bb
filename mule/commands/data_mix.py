"""`mule data mix` and `mule data split`: several sources made one folder, with a card."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mule.data.mix import MixSettings
    from mule.data.sources.options import ReadOptions

_NEAR = 0.8  # the Jaccard index of --near where it is not given


def mix(
    sources: Sequence[str | Path],
    *,
    out: Path,
    caps: Mapping[str, int],
    weights: Mapping[str, float],
    repeats: Mapping[str, int],
    max_examples: int | None,
    valid_share: float,
    seed: int,
    near: float | None,
    decontaminate: Sequence[str],
    options: ReadOptions,
) -> dict[str, Any]:
    """Write `out`: train.jsonl, valid.jsonl, mix.json and README.md; the figures of mix.json."""
    from mule.data import mix as work

    settings = work.MixSettings(
        caps=caps,
        weights=weights,
        repeats=repeats,
        max_examples=max_examples,
        valid_share=valid_share,
        seed=seed,
        near=near,
        decontaminate=decontaminate,
        read=options,
    )
    command = _command("mule data mix", sources, out, settings)
    figures = work.mix(sources, out, settings, verb="mule data mix", command=command)
    return _result(out, figures)


def split(
    paths: Sequence[str | Path],
    *,
    out: Path,
    valid_share: float = 0.2,
    seed: int = 0,
    options: ReadOptions | None = None,
) -> dict[str, Any]:
    """Divide every row of `paths` into train.jsonl and valid.jsonl of the folder `out`."""
    from mule.data import mix as work
    from mule.data.sources.options import ReadOptions

    settings = work.MixSettings(
        valid_share=valid_share,
        seed=seed,
        near=None,
        exact=False,
        read=options or ReadOptions(),
    )
    command = _command("mule data split", paths, out, settings)
    figures = work.split(paths, out, settings, verb="mule data split", command=command)
    return _result(out, figures)


def _result(out: Path, figures: dict[str, Any]) -> dict[str, Any]:
    from mule.data.mix.pool import REASONS

    sources = figures["sources"]
    removed = {reason: sum(source[reason] for source in sources) for reason in REASONS}
    return {
        "ok": True,
        "out": str(out),
        "card": str(out / "README.md"),
        "removed": removed,
        **figures,
        "next": shlex.join(["mule", "data", "check", str(out)]),
    }


def _command(verb: str, paths: Sequence[str | Path], out: Path, settings: MixSettings) -> str:
    """The command that makes the same folder again, quoted for a shell."""
    words = [*verb.split(), *map(str, paths), "--out", str(out)]
    if verb.endswith("mix"):
        for option, given in (
            ("--cap", settings.caps),
            ("--weight", settings.weights),
            ("--repeat", settings.repeats),
        ):
            for key, value in given.items():
                words += [option, f"{key}={value:g}"]
        if settings.max_examples is not None:
            words += ["--max-examples", str(settings.max_examples)]
    words += ["--valid-share", f"{settings.valid_share:g}", "--seed", str(settings.seed)]
    if verb.endswith("mix") and settings.near != _NEAR:
        words += ["--no-near"] if settings.near is None else ["--near", f"{settings.near:g}"]
    for path in settings.decontaminate:
        words += ["--decontaminate", path]
    return shlex.join([*words, *_reading(settings.read)])


def _reading(options: ReadOptions) -> list[str]:
    """The keys of `options` that are not their defaults, as the verbs take them."""
    words = [f"data.format={options.format}"] if options.format != "auto" else []
    words += [f"data.columns.{field}={name}" for field, name in options.columns]
    words += [f"data.threads={options.threads}"] if options.threads != "best" else []
    return words + ([f"data.wikitext={options.wikitext}"] if options.wikitext != "keep" else [])
