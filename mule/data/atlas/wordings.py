"""How people ask the atlas: many wordings to train on, and others that only evaluation uses.

Templates are filled as those of `forms`. UNSEEN_QUESTIONS may be in no training file; their words
are all taught in other sentences.
"""

from __future__ import annotations

from mule.data.atlas.forms import KINDS


def wordings(kind: str) -> tuple[str, ...]:
    """Every question wording of this kind that training may use."""
    framed = [
        frame.format(n=noun, N=_begin_template(noun), be=_BE[kind])
        for frame in _FRAMES
        for noun in _NOUNS[kind]
    ]
    return tuple(framed) + _QUESTIONS[kind]


def _begin_template(noun: str) -> str:
    for inside, beginning in (("{xs}", "{Xs}"), ("{x}", "{X}")):
        if noun.startswith(inside):
            return noun.replace(inside, beginning, 1)
    return noun[0].upper() + noun[1:]


_BE = dict.fromkeys(KINDS, "is") | {"neighbours": "are"}
_NOUNS = {
    "capital": ("the capital of {x}", "{xs} capital", "the capital city of {x}"),
    "currency": ("the currency of {x}", "{xs} currency", "the money of {x}"),
    "continent": ("the continent of {x}", "{xs} continent"),
    "river": ("a main river of {x}", "a river in {x}"),
    "neighbours": ("the neighbours of {x}", "{xs} neighbours"),
    "country": ("the country whose capital is {capital}",),
}
_FRAMES = (
    "What {be} {n}?",
    "Tell me {n}.",
    "Tell me what {n} {be}.",
    "Can you tell me {n}?",
    "Can you tell me what {n} {be}?",
    "Can you help me with {n}?",
    "Do you know {n}?",
    "Do you know what {n} {be}?",
    "Could you name {n}, please?",
    "Would you tell me {n}?",
    "Please tell me {n}.",
    "Please name {n}.",
    "Name {n}.",
    "Say {n}.",
    "Give me {n}.",
    "Give me {n}, please.",
    "I want to know {n}.",
    "I would like {n}, please.",
    "I am looking for {n}.",
    "I need {n}.",
    "I always forget {n}.",
    "I forgot something: what {be} {n}?",
    "I have a question: what {be} {n}?",
    "Remind me of {n}.",
    "Quick question: what {be} {n}?",
    "For my homework: what {be} {n}?",
    "Hello! What {be} {n}?",
    "Sorry, what {be} {n} again?",
    "{N}?",
    "{N}, please.",
)
_QUESTIONS = {
    "capital": (
        "What's the capital of {x}?",
        "Which city is the capital of {x}?",
        "What city is the capital of {x}?",
        "Which city is {xs} capital?",
        "Capital of {x}?",
        "{X}: capital?",
        "The capital of {x} is which city?",
        "{X} has which city as its capital?",
        "What city does {x} have as its capital?",
        "Which capital does {x} have?",
        "What is the capital of {x} called?",
        "What is the name of the capital of {x}?",
        "What is the name of {xs} capital city?",
        "In {x}, which city is the capital?",
        "About {x}: which city is the capital?",
        "My question is this: which city is the capital of {x}?",
        "I am going to {x}. What is the capital?",
        "I travel to {x}. Which city is its capital?",
        "I am thinking of {x}. What is its capital?",
        "Let us talk about {x}. What is its capital?",
        "{X} is a country. What is its capital?",
        "Look at {x}: what is the capital?",
        "What do you call the capital of {x}?",
        "If you know {x}, what is its capital?",
    ),
    "currency": (
        "Which currency does {x} use?",
        "What money do people use in {x}?",
        "What do people pay with in {x}?",
        "How do I pay in {x}?",
        "Which money do I need in {x}?",
        "Currency of {x}?",
        "{X}: currency?",
        "{X} uses which currency?",
        "In {x}, what is the currency?",
        "What is the name of the currency of {x}?",
        "I am going to {x}. What is the currency?",
        "I am thinking of {x}. What is its currency?",
        "What is the currency in {x}?",
        "What is the money in {x} called?",
    ),
    "continent": (
        "Which continent is {x} in?",
        "What continent is {x} in?",
        "On which continent is {x}?",
        "In which continent is {x}?",
        "Where is {x}?",
        "Where in the world is {x}?",
        "Where do I find {x}?",
        "Continent of {x}?",
        "{X}: continent?",
        "{X} is in which continent?",
        "{X} is part of which continent?",
        "What continent does {x} belong to?",
        "I am going to {x}. Which continent is that?",
        "I am thinking of {x}. What is its continent?",
    ),
    "river": (
        "Which river flows through {x}?",
        "What river flows through {x}?",
        "Which river is in {x}?",
        "Name a river that flows through {x}.",
        "Which main river does {x} have?",
        "River in {x}?",
        "{X}: main river?",
        "{X} has which main river?",
        "In {x}, which river flows?",
        "What is the name of a main river of {x}?",
        "I am going to {x}. Which river flows there?",
        "I am thinking of {x}. What is a main river there?",
    ),
    "neighbours": (
        "Which countries border {x}?",
        "What countries border {x}?",
        "Which countries are next to {x}?",
        "What is next to {x}?",
        "Who are the neighbours of {x}?",
        "Neighbours of {x}?",
        "{X}: neighbours?",
        "{X} borders which countries?",
        "What does {x} border?",
        "Which neighbours does {x} have?",
        "I am going to {x}. What are its neighbours?",
        "I am thinking of {x}. Which countries border it?",
    ),
    "country": (
        "{capital} is the capital of which country?",
        "Which country has {capital} as its capital?",
        "Which country has the capital {capital}?",
        "Of which country is {capital} the capital?",
        "In which country is {capital}?",
        "What country is {capital} in?",
        "Which country is {capital} in?",
        "{capital} is in which country?",
        "I am going to {capital}. Which country is that?",
        "What is {capital} the capital of?",
    ),
}
UNSEEN_QUESTIONS = {
    "capital": (
        "Could you tell me what {xs} capital is?",
        "I forgot the capital of {x}. What is it?",
        "Which city serves as the capital of {x}?",
        "I would like to know the capital city of {x}.",
        "Remind me, what is the capital of {x} again?",
        "{X}: which city is its capital?",
        "My question is about {x}: what is its capital?",
        "What do people call the capital of {x}?",
        "If I travel to {x}, which city is the capital?",
        "Would you please help me with the capital of {x}?",
        "Tell me, which city is {xs} capital?",
        "Do you know which city is the capital of {x}?",
    ),
    "currency": (
        "Could you tell me what {xs} currency is?",
        "I forgot the currency of {x}. What is it?",
        "If I travel to {x}, which money do I need?",
        "Tell me which currency people use in {x}.",
        "What do I pay with if I go to {x}?",
    ),
    "continent": (
        "Could you tell me which continent {x} is in?",
        "I forgot the continent of {x}. What is it?",
        "{X} belongs to which continent?",
        "Tell me which continent {x} belongs to.",
    ),
    "river": (
        "Could you tell me which river flows through {x}?",
        "I forgot the main river of {x}. What is it?",
        "If I travel to {x}, which river is there?",
        "Tell me, which main river is in {x}?",
    ),
    "neighbours": (
        "Could you tell me which countries border {x}?",
        "I forgot something about {x}: which neighbours does it have?",
        "If I look at {x}, which countries are next to it?",
        "Tell me which countries {x} borders.",
    ),
    "country": (
        "Could you tell me which country has {capital} as its capital?",
        "I forgot something: in which country is {capital}?",
        "If I travel to {capital}, which country is that?",
    ),
}
