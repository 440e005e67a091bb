"""Many updates refused as spikes, or a run that had to go back.

What it sees: updates refused because their loss or gradient norm lay optim.max_spike standard
deviations above the last 128, more than 2% of the updates since then and five at least; or a roll
back to a checkpoint, after five refused in a row or weights that were not finite.
Why it matters: a few spikes are part of training, and refusing them costs nothing. Many mean that
the rate is too high for the batch, or that some rows are broken; what is in them is not learned.
Going back means that the weights had been harmed.
What to do: lower optim.learning_rate; read the rows of the updates given below; when the batch is
small, take more rows (train.step_rows).
Source: Chowdhery et al. 2022 (PaLM, arXiv 2204.02311), section 5.1; OLMo-core's SkipStepOptimizer.
"""

from __future__ import annotations

from mule.doctor.finding import Found, Rule
from mule.doctor.history import History
from mule.doctor.phases import lower_rate
from mule.message import Message

_GUARDED_FROM = 128  # updates, before which none is called a spike
_SHARE, _FEWEST = 0.02, 5


def _check(history: History) -> Found | None:
    back = [event for event in history.events if event["kind"] == "rolled back"]
    refused = [
        event["step"]
        for event in history.events
        if event["kind"] == "update refused" and "spike" in event["cause"]
    ]
    if back:
        steps = [event["step"] for event in back]
        return Found(
            "alarm",
            steps[0],
            Message(
                "the run went back {} times, first from update {} to {}: {!s}",
                len(back),
                steps[0],
                back[0]["to"],
                back[0]["cause"],
            ),
            lower_rate(history, 2),
            {"rolled_back": steps, "refused": refused[:20]},
        )
    guarded = max(1, history.step - _GUARDED_FROM)
    if len(refused) < max(_FEWEST, _SHARE * guarded):
        return None
    return Found(
        "warning",
        refused[0],
        Message("{} of {} updates were refused as spikes", len(refused), guarded),
        lower_rate(history, 2),
        {"refused": refused[:20], "max_spike": history.recipe.optim.max_spike},
    )


RULE = Rule("D205", "many updates refused", _check, needs=())
