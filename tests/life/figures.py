"""The figures of RELIABILITY.md, in its order."""

from __future__ import annotations

from tests.life import harness as a
from tests.life import harness_resume as b
from tests.life.harness import Figure

FIGURES = {
    "F1": Figure(
        "kill -9 at a random moment of training and saving",
        "the resumed run ends with the same bits: weights, optimizer, log",
        a.killed,
    ),
    "F2": Figure(
        "the n-th open, write, fsync, rename, mkdir or unlink fails, for every n",
        "the last checkpoint loads, a clear error, and the resumed run ends with the same bits",
        a.failing_operation,
    ),
    "F3": Figure(
        "the disk fills up while a checkpoint, the log, prepared data or an export is written",
        "what was there before is untouched, a clear error, and the work can go on",
        a.full_disk,
    ),
    "F4": Figure(
        "a flipped bit, a cut, a zeroed page or a swapped file in a checkpoint",
        "refused by name, and the checkpoint before is taken",
        a.corrupted,
    ),
    "F4 power": Figure(
        "the power goes: writes that were not synced are lost, zeroed or cut",
        "the old state or the new one, never a third; nothing that was promised is lost",
        a.lost_writes,
    ),
    "F5": Figure(
        "resumed twice, thrice, at the edge of an epoch, from the middle of an update",
        "the same bits; with other micro-batches the same losses within 1e-5 (fp32)",
        b.resumed,
    ),
    "F10": Figure(
        "a signal while loading, preparing, training, evaluating and saving",
        "SIGINT ends with 130, SIGTERM with 143, others at once; the resumed run has the same bits",
        b.signalled,
    ),
    "F12": Figure(
        "memory and open files of a long run",
        "under 1,000 bytes an update, no file left open",
        b.leaks,
    ),
}
