"""The child process in which a user's file runs: one check after the other, told as lines of JSON.

One JSON object on stdin asks: `file`, `name`, `settings`, `checks`. On stdout a line says that a
check begins, and a line what it found, so that whoever listens knows how far a process came that died.
What the user's code prints goes to stderr. SIGUSR1 writes the line that runs to stderr. With `fits`,
the `vocab_size` and `max_seq_length` of a campaign, settings that say these are filled in.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mule.lab.inspect_attention import check_attention
from mule.lab.inspect_build import accepted, build, filled, load_class, own_files
from mule.lab.inspect_cache import check_cache
from mule.lab.inspect_causality import check_causality
from mule.lab.inspect_compile import check_compile
from mule.lab.inspect_forward import check_forward, check_shapes, prepare
from mule.lab.inspect_parameters import check_parameters
from mule.lab.inspect_subject import Outcome, Refused, Subject, is_own, lines_of, one_line
from mule.lab.inspect_training import check_bf16, check_operations, check_training

Tell = Callable[[dict[str, Any]], None]
CHECKS: dict[str, Callable[[Subject], Outcome]] = {
    "forward": check_forward,
    "shapes": check_shapes,
    "operations": check_operations,
    "training": check_training,
    "parameters": check_parameters,
    "causality": check_causality,
    "attention": check_attention,
    "cache": check_cache,
    "bf16": check_bf16,
    "compile": check_compile,
}
_NEEDED = ("build", "forward")  # without these there is nothing more to see


def examine(request: dict[str, Any], tell: Tell) -> None:
    """Build the module and make the checks that are asked for; `tell` gets what each finds."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _examine(request, tell)


def _examine(request: dict[str, Any], tell: Tell) -> None:
    file = Path(request["file"])
    subject: Subject | None = None

    def made() -> Outcome:
        nonlocal subject
        subject, takes = _subject(file, request)
        told = {"class": type(subject.model).__name__, "classes": _classes(subject)}
        told |= {"settings": subject.settings, "takes": takes, "files": own_files(file)}
        return Outcome(told)

    if not _told("build", made, file, tell):
        return
    assert subject is not None
    for name in request["checks"]:
        done = _told(name, lambda name=name: CHECKS[name](subject), file, tell)
        if not done and name in _NEEDED:
            return


def _subject(file: Path, request: dict[str, Any]) -> tuple[Subject, list[str]]:
    """The module, and the names of the settings that it takes."""
    torch.manual_seed(0)
    module, make = load_class(file, request["name"])
    settings, fits = request["settings"], request.get("fits")
    if fits:
        settings = filled(module, make, settings, fits)
    model = build(module, make, settings).eval()
    if not any(True for _ in model.parameters()):
        raise Refused(
            f"{request['name']} has no parameters", "assign its layers to self in __init__"
        )
    vocab_size, embedding = prepare(model, settings)
    subject = Subject(file, request["name"], settings, model, vocab_size, token_embedding=embedding)
    if fits:
        _fit(subject, fits)
    return subject, accepted(module, make, settings)


def _fit(subject: Subject, fits: dict[str, int]) -> None:
    """Let the checks use the tokens and the lengths of the campaign."""
    asked, embedding = fits["vocab_size"], subject.token_embedding
    if embedding is not None and embedding.num_embeddings < asked:
        raise Refused(
            f"its embedding has {embedding.num_embeddings:,} rows, the campaign's vocabulary "
            f"{asked:,} tokens",
            "give it as many, by the argument that says so, or leave that argument away: vocab_size "
            "is filled in where the class takes it",
        )
    subject.vocab_size, subject.most_tokens = asked, fits["max_seq_length"]


def _classes(subject: Subject) -> list[str]:
    """The user's own classes that take part, those they derive from too."""
    found = {cls for one in subject.model.modules() for cls in type(one).__mro__}
    start = f"_module_of_{subject.file.stem}"
    return sorted(cls.__name__ for cls in found if cls.__module__ == start)


def _told(name: str, check: Callable[[], Outcome], file: Path, tell: Tell) -> bool:
    """Make one check and tell what it found; whether it came to an end."""
    tell({"check": name, "state": "begins"})
    try:
        outcome, done = check(), True
    except Refused as refused:
        outcome, done = Outcome(), False
        outcome.add("fault", refused.found, refused.change, refused.place)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # their sys.exit too
        outcome, done = _broken(error, file), False
    tell(
        {
            "check": name,
            "state": "ended" if done else "failed",
            "facts": outcome.facts,
            "findings": [one.as_dict() for one in outcome.findings],
        }
    )
    return done


def _broken(error: BaseException, file: Path) -> Outcome:
    """What to say of an error that came through the user's code."""
    own = [(name, line) for name, line in lines_of(error.__traceback__) if is_own(file, name)]
    if isinstance(error, SyntaxError) and error.lineno is not None:
        own.append((error.filename or str(file), error.lineno))
    place = f"{Path(own[-1][0]).name}:{own[-1][1]}" if own else None
    outcome = Outcome()
    if isinstance(error, SystemExit):
        found, change = "it calls sys.exit", "keep that below: if __name__ == '__main__':"
    elif isinstance(error, ModuleNotFoundError):
        found, change = one_line(error), f"install it beside Mule: pip install {error.name}"
    elif "modified by an inplace operation" in str(error):
        found, change = "not measured: the backward pass fails", "see training"
    else:
        found = f"{type(error).__name__}: {one_line(error)}"
        change = "mend this line and check again" if place else "see the message"
    outcome.add("fault", found, change, place)
    return outcome


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what their code prints must not mix with the answers
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=False)
    request = json.load(sys.stdin)
    torch.set_num_threads(request["threads"])

    def tell(event: dict[str, Any]) -> None:
        answers.write(json.dumps(event) + "\n")
        answers.flush()

    tell({"check": "start", "state": "ended", "facts": {}, "findings": []})
    examine(request, tell)
    tell({"check": "all", "state": "ended", "facts": {}, "findings": []})


if __name__ == "__main__":
    main()
