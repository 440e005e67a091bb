"""The figures of RELIABILITY.md, in its order."""

from __future__ import annotations

from tests.life import harness as a
from tests.life import harness_guard as c
from tests.life import harness_ranks as d
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
    "F6": Figure(
        "killed on 1, 2, 3 or 4 processes and resumed on others: whole, in shares, as two machines",
        "the same samples in every update, and losses within 1e-5 (fp32) of the undisturbed run",
        d.moved,
    ),
    "F7": Figure(
        "the same update cut into micro-batches of 8, 4, 2 and 1 rows, with 1 to 40 targets each",
        "loss and gradient norm within 1e-6 (relative, fp32)",
        c.cut_otherwise,
    ),
    "F8": Figure(
        "memory runs out in an update; a process killed as the system does it",
        "the update is repeated with fewer rows at once, losses within 1e-6; what fits in no way is a "
        "clear error; a resumed run names the kill",
        c.out_of_memory,
    ),
    "F9": Figure(
        "NaN, infinities and spikes (10 times) in loss, gradient and weights",
        "the update is not applied; no checkpoint holds one; a run that is stuck goes back, at most "
        "three times, and also when it is killed or stopped then ends with the same bits",
        c.gone_wrong,
    ),
    "F10": Figure(
        "a signal while loading, preparing, training, evaluating and saving",
        "SIGINT ends with 130, SIGTERM with 143, others at once; the resumed run has the same bits",
        b.signalled,
    ),
    "F11": Figure(
        "a row raises; data is cut or removed below a running run; its preparation is killed",
        "unharmed, or a named error or a kill and then the same bits; nothing is passed over",
        c.data_disturbed,
    ),
    "F12": Figure(
        "memory and open files of a long run",
        "under 1,000 bytes an update, no file left open",
        b.leaks,
    ),
}
