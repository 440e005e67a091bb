"""DonkeyTune: its variables (`MODEL`, `ITERS`, ... of `make train`), or the options of fine-tune.sh.

It hands them to mlx-lm with `rank`, `alpha: 2 x rank`, `dropout: 0.05` and `scale: 10` in a file of
its own (docs/from-donkeytune.md), so the rest is mlx-lm's.
"""

from __future__ import annotations

from mule.compare.dialects import mlx_lm
from mule.compare.dialects.data_sets import DataSet, put_sets
from mule.compare.dialects.foreign_setup import ForeignSetup
from mule.compare.dialects.table import Dialect, Entry, Key, Left, Trap, left
from mule.compare.dialects.values import number, run_name, whole

_SCALE = 10.0
_FACTS: dict[tuple[str, ...], Key] = {
    ("MODEL", "model"): Key("model.path"),
    ("DATA_DIR", "data"): Key("data"),
    ("BATCH_SIZE", "batch_size"): Key("micro_rows", number),
    ("NUM_LAYERS", "num_layers"): Key("num_layers", number),
    ("ITERS", "iters"): Key("iterations", number),
    ("LR", "lr"): Key("optim.learning_rate", number),
    ("RANK", "rank"): Key("adapter.lora.r", number),
    ("QUANTIZE",): Key("quantize"),
    ("OUTPUT_NAME",): Key("name", run_name),
    ("save_every",): Key("save_iterations", whole),
    ("adapter_path",): Key("name", run_name),
}
_KEYS: dict[str, Entry] = {
    **{name: key for names, key in _FACTS.items() for name in names},
    "RESUME_FROM": Left("lost", "an adapter of mlx-lm cannot be gone on with; begin anew"),
    "resume": Left("lost", "an adapter of mlx-lm cannot be gone on with; begin anew"),
    "INPUTS": Left("lost", "join the data first: mule data mix A B --out data"),
    **left("report", "HF_TOKEN", "PROMPT", "OUTPUT"),
}


def _read(setup: ForeignSetup) -> None:
    setup.put("lora_scale", _SCALE)
    rank = setup.number("adapter.lora.r")
    if rank is not None:
        setup.put("ignored_alpha", 2 * rank)
    mlx_lm.read(setup)
    quantize = setup.value("quantize")
    if quantize is not None:
        setup.put("export.types", [str(quantize).lower()], setup.given.get("QUANTIZE"))
    if setup.value("data.train") is None:
        put_sets(setup, [DataSet("./data")], None)


def _traps(setup: ForeignSetup) -> list[Trap]:
    text = "DonkeyTune writes"
    return [
        Trap(trap.key, trap.text)
        if trap.key != "lora_parameters.scale"
        else Trap("RANK", f"{text} scale: 10: {trap.text}")
        for trap in mlx_lm.traps(setup)
    ]


DIALECT = Dialect(
    name="donkeytune",
    title="DonkeyTune",
    version="of its Makefile and fine-tune.sh",
    keys=_KEYS,
    signs=frozenset(
        {"MODEL", "DATA_DIR", "BATCH_SIZE", "NUM_LAYERS", "ITERS", "LR", "RANK", "QUANTIZE"}
    ),
    defaults={
        **mlx_lm.DEFAULTS,
        "model.path": "unsloth/Qwen2.5-1.5B-Instruct",
        "num_layers": 8,
        "iterations": 600,
        "adapter.lora.dropout": 0.05,
        "val_batches": 5,
        "eval_iterations": 50,
        "save_iterations": 100,
        "quantize": "Q4_K_M",
    },
    read=_read,
    traps=_traps,
)
