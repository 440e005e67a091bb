"""The report's section on the search: what was tried for each variant, and what it chose."""

from __future__ import annotations

from mule.config.search import searched_keys
from mule.lab.document import Block, Section, Table, Text
from mule.lab.findings import Evidence
from mule.lab.records import Arm, Row, Study
from mule.lab.wording import MISSING, number


def search(evidence: Evidence) -> Section | None:
    """What each variant's search tried and chose; None where nothing was searched."""
    study = evidence.study
    names = [_called(key) for key in searched_keys(study.asked.get("search") or {})]
    if not names:
        return None
    tables = {arm.name: study.searches[arm.file_stem] for arm in _searched_arms(study)}
    if not tables:
        return Section("The search", [Text(f"The {' and the '.join(names)}: {MISSING}.")])
    one = next(iter(tables.values()))
    ranges = ", ".join(
        f"{_called(key)} {low:g} to {high:g}" for key, (low, high) in one["ranges"].items()
    )
    how = f"sampled by {one['sampler']} (TPE)" if one["sampler"] else "listed in the campaign"
    told = (
        f"Each variant has its own {' and '.join(names)}: of the try with the lowest validation loss of "
        f"{len(one['rows'])} short runs of {number(one['tokens'])} tokens from seed {one['seed']}, "
        f"{how}: {ranges}. So a difference between variants is one between variants at what was best "
        "for each, as far as it was searched; the test set had no part in it."
    )
    blocks: list[Block] = [Text(told), _chosen(tables), _tried(tables)]
    return Section("The search", blocks)


def _searched_arms(study: Study) -> list[Arm]:
    return [arm for arm in study.arms if arm.file_stem in study.searches]


def _chosen(tables: dict[str, Row]) -> Table:
    names = list(next(iter(tables.values()))["chosen"])
    rows = []
    for arm, table in tables.items():
        losses = sorted(_losses(table))
        rows.append(
            [
                arm,
                *(f"{table['chosen'][name]:g}" for name in names),
                number(losses[0], 4),
                number(losses[1], 4) if len(losses) > 1 else MISSING,
                str(len(table["rows"]) - len(losses)),
                "; ".join(table["at_edge"]) or "–",
            ]
        )
    columns = ["variant", *map(_called, names), "validation loss", "next best", "diverged"]
    caption = "What the search chose, and its loss in nats a token at the end of the short run."
    return Table(caption, [*columns, "at an edge"], rows, words=(len(columns),))


def _tried(tables: dict[str, Row]) -> Table:
    """Every try, the lowest values first."""
    rows = []
    for arm, table in tables.items():
        names = list(table["chosen"])
        tries = sorted(table["rows"], key=lambda row: [row[name] for name in names])
        for row in tries:
            loss = row["valid_loss"]
            is_best = all(row[name] == table["chosen"][name] for name in names)
            told = "diverged" if loss is None else f"{loss:,.4f}{' (chosen)' if is_best else ''}"
            values = [f"{row[name]:g}" for name in names]
            rows.append([arm, *values, told])
    names = [_called(name) for name in next(iter(tables.values()))["chosen"]]
    return Table("Every try.", ["variant", *names, "validation loss"], rows)


def _losses(table: Row) -> list[float]:
    return [row["valid_loss"] for row in table["rows"] if row["valid_loss"] is not None]


def _called(key: str) -> str:
    """learning rate of optim.learning_rate."""
    return key.rpartition(".")[2].replace("_", " ")
