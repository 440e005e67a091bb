"""What to change so that a run fits, the least harm first, with the memory it then needs. No torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from mule.config.schema import Recipe
from mule.errors import MuleError
from mule.models.config import SIZES, ModelConfig
from mule.plan.estimate import Verdict, verdict
from mule.plan.fitted import Fitted
from mule.plan.peak import Process, peak_memory
from mule.plan.resolve import Facts, resolve
from mule.plan.shape import new_model_config
from mule.plan.subject import smaller_models

_SHORTEST = 128  # a row is not halved below
_WORTH = 0.99  # of the memory: what saves less is not named


@dataclass(frozen=True)
class Remedy:
    """Settings as they are typed, what they cost, and what the run would then need."""

    words: tuple[str, ...]
    harm: str
    needed_bytes: int
    verdict: Verdict


@dataclass(frozen=True)
class _Try:
    """A change of the recipe, or of what is trained."""

    words: tuple[str, ...]
    harm: str
    recipe: Recipe
    config: ModelConfig
    facts: Facts


def remedies(
    config: ModelConfig,
    recipe: Recipe,
    facts: Facts,
    process: Process,
    fitted: Fitted,
    *,
    free_bytes: int,
) -> list[Remedy]:
    """Each change alone, in order of harm; then all that cost nothing of what is learned, together.

    `recipe` has everything decided. What saves next to nothing is left out.
    """
    now = peak_memory(config, recipe, facts, process, fitted).total

    def remedy(tried: _Try) -> Remedy | None:
        try:
            resolved = resolve(tried.recipe, tried.config, tried.facts).recipe
        except MuleError:  # the settings exclude each other
            return None
        needed = peak_memory(tried.config, resolved, tried.facts, process, fitted).total
        if needed > _WORTH * now:
            return None
        return Remedy(tried.words, tried.harm, needed, verdict(needed, free_bytes))

    start = _Try((), "", recipe, config, facts)
    found = [remedy(tried) for tried in _alone(start)]
    known = [each for each in found if each is not None]
    together = remedy(_harmless_together(start))
    if together is not None and not any(row.verdict == "fits" for row in known):
        known += [together] if len(together.words) > 1 else []
    return known


def _alone(start: _Try) -> Iterator[_Try]:
    """The changes, the least harm first."""
    for change in (_one_row, _selective, _full, _small_moments, _shorter_rows):
        if (tried := change(start)) is not None:
            yield tried
    yield from _adapters(start)
    yield from _smaller(start)


def _harmless_together(start: _Try) -> _Try:
    tried = start
    changes: tuple[Callable[[_Try], _Try | None], ...] = (_one_row, _full, _small_moments)
    for change in changes:
        tried = change(tried) or tried
    return replace(tried, harm="slower; the moments are rounded")


def _one_row(t: _Try) -> _Try | None:
    if int(t.recipe.train.micro_batch_rows) == 1:
        return None
    return _train(t, "micro_batch_rows", 1, "none: the same result, a little slower")


def _selective(t: _Try) -> _Try | None:
    if t.recipe.train.activation_checkpointing != "none":
        return None
    return _train(
        t, "activation_checkpointing", "selective", "none: the same bits, a little slower"
    )


def _full(t: _Try) -> _Try | None:
    if t.recipe.train.activation_checkpointing == "full":
        return None
    harm = "none: the same bits, about a third more arithmetic"
    return _train(t, "activation_checkpointing", "full", harm)


def _small_moments(t: _Try) -> _Try | None:
    if t.recipe.optim.kind != "adamw" or t.recipe.adapter.kind != "none":
        return None
    optim = t.recipe.optim.model_copy(update={"kind": "adamw8bit"})
    recipe = t.recipe.model_copy(update={"optim": optim})
    return replace(
        t,
        words=(*t.words, "optim.kind=adamw8bit"),
        harm="small: the moments are rounded to 8 bits (extra qlora)",
        recipe=recipe,
    )


def _shorter_rows(t: _Try) -> _Try | None:
    length = min(t.recipe.data.max_seq_length, t.facts.row_length) // 2
    if length < _SHORTEST:
        return None
    data = t.recipe.data.model_copy(update={"max_seq_length": length})
    share = t.facts.row_length / length
    facts = replace(
        t.facts,
        row_length=length,
        num_rows=round(t.facts.num_rows * share),
        targets_per_row=t.facts.targets_per_row / share,
        examples_per_row=t.facts.examples_per_row / share,
    )
    lost = t.facts.num_chats > 0
    harm = "longer chats are left out or cut off" if lost else "no context beyond a row is learned"
    words = (*t.words, f"data.max_seq_length={length}")
    return replace(
        t, words=words, harm=harm, recipe=t.recipe.model_copy(update={"data": data}), facts=facts
    )


def _adapters(t: _Try) -> Iterator[_Try]:
    if t.recipe.model.path is None:
        return
    harms = {
        "lora": "only an adapter is trained: new knowledge is learned less well",
        "qlora": "as with lora, on a base that is rounded to 4 bits",
    }
    left = {"none": ("lora", "qlora"), "lora": ("qlora",)}.get(t.recipe.adapter.kind, ())
    for kind in left:
        adapter = t.recipe.adapter.model_copy(update={"kind": kind, "trunk_cache": "off"})
        train = t.recipe.train.model_copy(update={"freeze": [], "sharding": "auto"})
        optim = t.recipe.optim.model_copy(update={"kind": "adamw"})
        update = {"adapter": adapter, "train": train, "optim": optim}
        recipe = t.recipe.model_copy(update=update)
        yield replace(t, words=(f"adapter.kind={kind}",), harm=harms[kind], recipe=recipe)


def _smaller(t: _Try) -> Iterator[_Try]:
    """The next smaller model: a named size, or one that is published."""
    harm = "a smaller model learns less"
    model = t.recipe.model
    if model.path is not None:
        for name, config in smaller_models(t.config)[:1]:
            yield replace(t, words=(f"model.path={name}",), harm=harm, config=config)
        return
    sizes = list(SIZES)
    if model.size is None or model.size == sizes[0]:
        return
    smaller = sizes[sizes.index(model.size) - 1]
    recipe = t.recipe.model_copy(update={"model": model.model_copy(update={"size": smaller})})
    size = model.vocab_size or t.config.vocab_size
    config = new_model_config(recipe, size)
    yield replace(t, words=(f"model.size={smaller}",), harm=harm, recipe=recipe, config=config)


def _train(t: _Try, key: str, value: int | str, harm: str) -> _Try:
    train = t.recipe.train.model_copy(update={key: value})
    recipe = t.recipe.model_copy(update={"train": train})
    return replace(t, words=(*t.words, f"train.{key}={value}"), harm=harm, recipe=recipe)
