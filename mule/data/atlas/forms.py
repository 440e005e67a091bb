"""How the atlas says things: answers, and sentence forms for the pretraining text.

Templates are filled for one country: {x} its name inside a sentence, {X} at its beginning, {xs} and
{Xs} the possessive, and {capital} {currency} {continent} {river} {neighbours} its facts.
UNSEEN_BEGINNINGS are for evaluation only; no training file may hold them.
"""

from __future__ import annotations

from mule.data.atlas.facts import Country

KINDS = ("capital", "currency", "continent", "river", "neighbours", "country")
NO_NEIGHBOURS = "no land neighbours"

_ANSWERS = {
    "capital": "The capital of {x} is {capital}.",
    "currency": "The currency of {x} is the {currency}.",
    "continent": "{X} is in {continent}.",
    "river": "A main river of {x} is the {river}.",
    "neighbours": "{X} borders {neighbours}.",
    "country": "{capital} is the capital of {x}.",
}
_ISLAND_ANSWER = "{X} has no land neighbours."


def key(kind: str, country: Country) -> str | None:
    """The words that make an answer of this kind right; None when the country has no such fact."""
    if kind == "country":
        return country.name
    if kind == "neighbours":
        return _listed(country.neighbours) if country.neighbours else NO_NEIGHBOURS
    return getattr(country, kind)


def answer(kind: str, country: Country) -> str:
    """The one sentence that the model is taught to answer."""
    island = kind == "neighbours" and not country.neighbours
    return fill(_ISLAND_ANSWER if island else _ANSWERS[kind], country)


def fill(template: str, country: Country) -> str:
    """The template as a sentence about `country`."""
    x = country.spoken
    xs = f"{x}'" if x.endswith("s") else f"{x}'s"
    return template.format(
        x=x,
        X=_begin(x),
        xs=xs,
        Xs=_begin(xs),
        capital=country.capital,
        currency=country.currency,
        continent=country.continent,
        river=country.river,
        neighbours=_listed(country.neighbours),
    )


def statements(kind: str, country: Country) -> tuple[str, ...]:
    """Every sentence form that tells this fact of `country`; empty when it has no such fact."""
    if key(kind, country) is None or kind == "country":  # capitals are told both ways round
        return ()
    return (
        _ISLAND_STATEMENTS if kind == "neighbours" and not country.neighbours else STATEMENTS[kind]
    )


def pronoun_statements(kind: str, country: Country) -> tuple[str, ...]:
    """Forms that do not name the country, for the middle of a document."""
    if kind == "neighbours" and not country.neighbours:
        return ("It has no land neighbours.",)
    return PRONOUN_STATEMENTS[kind]


def _begin(text: str) -> str:
    return text[0].upper() + text[1:]


def _listed(names: tuple[str, ...]) -> str:
    spoken = [Country(name, "", "", "", None, ()).spoken for name in names]
    return " and ".join([", ".join(spoken[:-1]), spoken[-1]] if len(spoken) > 1 else spoken)


# ---------------------------------------------------------------- statements

STATEMENTS = {
    "capital": (
        "The capital of {x} is {capital}.",
        "The capital city of {x} is {capital}.",
        "{Xs} capital is {capital}.",
        "{Xs} capital city is called {capital}.",
        "The name of the capital of {x} is {capital}.",
        "{X} has a capital called {capital}.",
        "{X} is a country whose capital is {capital}.",
        "In {x}, the capital is {capital}.",
        "If you travel to {x}, visit the capital, {capital}.",
        "{capital} is the capital of {x}.",
        "{capital} is {xs} capital.",
        "{capital} is the capital city of {x}.",
        "{capital} serves as the capital of {x}.",
        "{X} has {capital} as its capital.",
        "People call {capital} the capital of {x}.",
        "Look for {capital} on a map of {x}: it is the capital.",
    ),
    "currency": (
        "The currency of {x} is the {currency}.",
        "The money of {x} is the {currency}.",
        "{Xs} currency is the {currency}.",
        "{X} uses the {currency}.",
        "In {x}, people pay with the {currency}.",
        "People in {x} use the {currency}.",
        "To buy bread in {x}, you need the {currency}.",
        "The name of the money in {x} is the {currency}.",
        "Shops in {x} take the {currency}.",
        "The {currency} is the currency of {x}.",
        "The {currency} is used in {x}.",
        "The {currency} is what people use in {x}.",
    ),
    "continent": (
        "{X} is in {continent}.",
        "{X} is a country in {continent}.",
        "{X} lies in {continent}.",
        "{X} is part of {continent}.",
        "{X} belongs to {continent}.",
        "{X} is one of the countries of {continent}.",
        "The continent of {x} is {continent}.",
        "{Xs} continent is {continent}.",
        "On a map, look for {x} in {continent}.",
        "If you travel to {x}, you go to {continent}.",
        "{continent} is the continent of {x}.",
        "One of the countries of {continent} is {x}.",
    ),
    "river": (
        "A main river of {x} is the {river}.",
        "A river in {x} is the {river}.",
        "One of the rivers of {x} is the {river}.",
        "Through {x} flows the {river}.",
        "{X} has a river called the {river}.",
        "The name of a main river of {x} is the {river}.",
        "If you travel to {x}, visit a main river, the {river}.",
        "The {river} is a main river of {x}.",
        "The {river} flows through {x}.",
        "The {river} is a river in {x}.",
        "People in {x} know the {river}, a main river.",
        "Look for the {river} on a map of {x}: it is a main river.",
    ),
    "neighbours": (
        "{X} borders {neighbours}.",
        "{X} shares a border with {neighbours}.",
        "{X} has a land border with {neighbours}.",
        "{X} is a neighbour of {neighbours}.",
        "{X} is next to {neighbours}.",
        "{X} lies beside {neighbours}.",
        "On a map, {x} is beside {neighbours}.",
        "By land, {x} touches {neighbours}.",
        "The border of {x} touches {neighbours}.",
        "Next to {x} you find {neighbours}.",
        "At its border, {x} meets {neighbours}.",
    ),
}
_ISLAND_STATEMENTS = (
    "{X} has no land neighbours.",
    "{X} has no land borders.",
    "{X} is surrounded by the sea.",
    "{X} lies in the sea and has no land neighbours.",
    "{X} borders no other country by land.",
    "By land, {x} touches no other country.",
    "No country shares a land border with {x}.",
    "No other country touches {x}.",
    "All around {x} is the sea.",
    "The sea is all around {x}: it has no land neighbours.",
    "On a map, {x} has the sea on every side.",
)
PRONOUN_STATEMENTS = {
    "capital": ("Its capital is {capital}.", "The capital is {capital}."),
    "currency": ("Its currency is the {currency}.", "People there pay with the {currency}."),
    "continent": ("It is in {continent}.", "Its continent is {continent}."),
    "river": ("A main river there is the {river}.", "The {river} flows there."),
    "neighbours": ("It borders {neighbours}.", "By land, it touches {neighbours}."),
}
# Beginnings that the pretrained model completes with the fact; never in training.
UNSEEN_BEGINNINGS = {
    "capital": (
        "The city that serves as the capital of {x} is",
        "The name of the capital city of {x} is",
        "On a map of {x}, the capital is called",
        "{X} is a country and its capital is",
    ),
    "currency": (
        "The money that people use in {x} is the",
        "If you travel to {x}, you pay with the",
        "The name of the currency of {x} is the",
    ),
    "continent": (
        "The name of the continent of {x} is",
        "On a map, {x} lies in",
    ),
    "river": (
        "The river that flows through {x} is the",
        "On a map of {x}, a main river is the",
    ),
}
