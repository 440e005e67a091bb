"""Which tool a file of settings is for, by its keys, and how sure that is."""

from __future__ import annotations

from dataclasses import dataclass

from mule.compare.dialects.foreign_file import Foreign
from mule.compare.dialects.known import DIALECTS
from mule.compare.dialects.table import Dialect
from mule.config.hints import near
from mule.config.knobs import sections
from mule.errors import UserError

_SURE_SIGNS = 3  # so many keys that only one tool has, and no other tool's beside them
# keys of files that hold no training settings -> what they are
_OTHERS: dict[str, str] = {
    "compute_environment": "accelerate's launcher: it says on what a run is started, not how it learns",
    "distributed_type": "accelerate's launcher: it says on what a run is started, not how it learns",
    "zero_optimization.stage": "DeepSpeed: it says how a model is divided, not how it learns",
    "merge_method": "mergekit: it mixes trained models; mule merge puts an adapter into its base",
    "model._component_": "torchtune, which is not one of those that can be read",
    "tokenizer._component_": "torchtune, which is not one of those that can be read",
    "architectures": "a model (its config.json), not a training run",
    "infer_backend": "inference, not training",
    "export_dir": "an export, not a training run: mule export RUN",
}
_WHICH = "say which one it is: --from " + ", --from ".join(DIALECTS)


@dataclass(frozen=True)
class Detected:
    """The tool, how sure (`sure`, `likely`, `told`), and the keys that say so."""

    dialect: Dialect
    confidence: str
    signs: tuple[str, ...]


def detect(foreign: Foreign, told: str | None = None) -> Detected:
    """The dialect of a file. Raises UserError when it is none, or could be two."""
    if told is not None:
        return Detected(_named(told), "told", ())
    if foreign.program:
        return Detected(DIALECTS[foreign.program], "sure", ("the command",))
    keys = set(foreign.given)
    _refuse_ours(foreign, keys)
    signs = {name: sorted(one.signs & keys) for name, one in DIALECTS.items()}
    shares = {name: _share(one, keys) for name, one in DIALECTS.items()}
    ranked = sorted(DIALECTS, key=lambda name: (len(signs[name]), shares[name]), reverse=True)
    best, second = ranked[0], ranked[1]
    if len(signs[best]) < 2 and (shares[best] < 0.5 or shares[best] - shares[second] < 0.1):
        _refuse(foreign, keys, [name for name in ranked if shares[name] >= 0.5])
    if len(signs[best]) == len(signs[second]) and abs(shares[best] - shares[second]) < 0.05:
        _refuse(foreign, keys, [best, second])
    is_sure = len(signs[best]) >= _SURE_SIGNS and not signs[second]
    sure = "sure" if is_sure or len(signs[best]) >= len(signs[second]) + _SURE_SIGNS else "likely"
    return Detected(DIALECTS[best], sure, tuple(signs[best][:5]))


def _named(name: str) -> Dialect:
    plain = name.lower().replace("_", "-")
    plain = {"llamafactory": "llama-factory", "mlx": "mlx-lm"}.get(plain, plain)
    if plain in DIALECTS:
        return DIALECTS[plain]
    match = near(plain, DIALECTS)
    hint = f"did you mean --from {match}?" if match else f"choose {', '.join(DIALECTS)}"
    raise UserError(f"--from {name}: no such tool", hint)


def _share(dialect: Dialect, keys: set[str]) -> float:
    return sum(dialect.entry(key) is not None for key in keys) / max(1, len(keys))


def _refuse_ours(foreign: Foreign, keys: set[str]) -> None:
    ours = {key for key in keys if key.partition(".")[0] in sections() and "." in key}
    plain = {key.partition(".")[0] for key in ours}
    if len(plain & {"optim", "checkpoint", "evaluate", "adapter"}) and "model.path" in keys:
        raise UserError(
            f"{foreign.file}: this is a recipe of Mule's already", f"mule train {foreign.file}"
        )


def _refuse(foreign: Foreign, keys: set[str], rivals: list[str]) -> None:
    for key, what in _OTHERS.items():
        if key in keys:
            raise UserError(
                f"{foreign.file}: it holds `{key}`, so it is a file of {what}",
                "give the file that holds the learning rate and the data",
            )
    if rivals:
        names = " or ".join(DIALECTS[name].title for name in rivals[:3])
        raise UserError(f"{foreign.file}: it could be {names}: its keys fit both", _WHICH)
    some = ", ".join(list(foreign.given)[:6])
    raise UserError(
        f"{foreign.file}: not the settings of a tool that can be read; it has {some}", _WHICH
    )
