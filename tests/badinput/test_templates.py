"""Chat templates that would take all memory or all time: each is stopped, in a process kept small."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest

from mule.tokenizer.sandbox import MAX_SECONDS

_DOUBLED = "{% set ns = namespace(x='ab') %}{% for i in range(60) %}DO{% endfor %}{{ ns.x }}"
_NESTED = (
    "{% set ns = namespace(x=[1]) %}"
    "{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}"
)
TEXT, STEPS = (
    "a text or list in it exceeds 1,048,576 characters",
    "it takes more than 100,000 steps",
)
HOSTILE = {
    "doubled by +": (_DOUBLED.replace("DO", "{% set ns.x = ns.x + ns.x %}"), TEXT),
    "doubled by ~": (_DOUBLED.replace("DO", "{% set ns.x = ns.x ~ ns.x %}"), TEXT),
    "doubled by join": (_DOUBLED.replace("DO", "{% set ns.x = [ns.x, ns.x] | join %}"), TEXT),
    "joined by a text": (_DOUBLED.replace("DO", "{% set ns.x = ns.x.join([ns.x] * 9) %}"), TEXT),
    "replaced": (_DOUBLED.replace("DO", "{% set ns.x = ns.x.replace('a', ns.x) %}"), TEXT),
    "replaced by a filter": (
        _DOUBLED.replace("DO", "{% set ns.x = ns.x | replace('a', ns.x) %}"),
        TEXT,
    ),
    "doubled in a loop's list": (
        "{% for a in ['x' * 4096] %}"
        + "".join(f"{{% for {b} in [{a} + {a}] %}}" for a, b in zip("abcdefghijkl", "bcdefghijklm"))
        + "{{ m }}"
        + "{% endfor %}" * 13,
        TEXT,
    ),
    "doubled by a macro": (
        "{% macro f(x, n) %}{{ f(x + x, n - 1) if n else x }}{% endmacro %}{{ f('ab', 60) }}",
        TEXT,
    ),
    "doubled by with": (
        "{% set a = 'x' * 4096 %}"
        + "".join(f"{{% with {b} = {a} + {a} %}}" for a, b in zip("abcdefghijkl", "bcdefghijklm"))
        + "{{ m }}"
        + "{% endwith %}" * 12,
        TEXT,
    ),
    "a long sum": (
        "{% set a = messages[0].content * 1 %}{{ " + "+".join(["t"] * 90) + " }}",
        STEPS,
    ),
    "lists in lists as text": (_NESTED + "{{ ns.x }}", STEPS),
    "lists in lists as JSON": (_NESTED + "{{ ns.x | tojson }}", STEPS),
    "lists in lists, joined": (_NESTED + "{{ ns.x | join }}", STEPS),
    "lists in lists, made a text": (_NESTED + "{{ (ns.x | string) | length }}", STEPS),
    "loops over a text": (
        "{% for a in t %}{% for b in t %}{% for c in t %}{% endfor %}{% endfor %}{% endfor %}",
        STEPS,
    ),
    "macros that call each other": (
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        STEPS,
    ),
    "a recursive loop": (
        "{% for a in [[[1] * 99] * 99] * 99 recursive %}"
        "{{ loop(a) if a is iterable and a is not string else loop([1] * 99) }}{% endfor %}",
        "maximum recursion depth exceeded",
    ),
    "much text in a loop": (
        "{% set x %}{% for a in t %}{% for b in t %}"
        + "y" * 60_000
        + "{% endfor %}{% endfor %}{% endset %}",
        STEPS,
    ),
    "much text in a macro": (
        "{% macro f() %}" + "y" * 60_000 + "{% endmacro %}"
        "{% for a in t %}{% set x = f() %}{% endfor %}",
        STEPS,
    ),
    "a large text written often": (
        "{% set x %}{% for a in t %}{{ t }}{{ t }}{{ t }}{% endfor %}{% endset %}",
        STEPS,
    ),
    "batch": ("{{ [1] | batch(10 ** 3, 0) | list }}", "operator ** is not allowed"),
    "batch of very many": ("{{ [1] | batch(999999999, 0) | list }}", "batch takes at most 10,000"),
    "slice": ("{{ [1] | slice(999999999) | list }}", "slice takes at most 10,000"),
    "round": ("{{ 1.5 | round(999999999, 'ceil') }}", "round takes at most 64"),
    "indent": ("{{ 'a\nb' | indent(999999999) }}", "indent takes at most 64"),
    "indent of JSON": ("{{ [1] | tojson(indent=999999999) }}", "indent takes at most 64"),
    "separators of JSON": (
        "{{ [1, 1] | tojson(separators=(t, t)) }}",
        "separators takes at most 64",
    ),
    "a format": ("{{ '{:999999999}'.format(1) }}", "is unsafe"),
    "a format of a map": ("{{ '{a:999999999}'.format_map({'a': 1}) }}", "is unsafe"),
    "a translation": ("{{ t.translate({97: t}) }}", "is unsafe"),
    "bytes": ("{{ 'a'.encode().ljust(999999999) }}", "is unsafe"),
    "bytes of a number": ("{{ (1).to_bytes(999999999) }}", "is unsafe"),
    "lorem ipsum": ("{{ lipsum(n=999999999) }}", "'lipsum' is undefined"),
    "a filter that is gone": ("{{ t | urlize }}", "No filter named 'urlize'"),
    "a filter of the sandbox": ("{{ t | mule:kept }}", "not valid Jinja"),
}
_RUN = """
import json, resource, sys
resource.setrlimit(resource.RLIMIT_AS, (1_500_000_000,) * 2)
from mule.errors import ModelError
from mule.tokenizer import sandbox
from mule.tokenizer.template import ChatTemplate
sandbox.MAX_STEPS = 100_000  # a tenth, to be done sooner
for name, source in json.load(sys.stdin).items():
    try:
        chat = [{"role": "user", "content": "a"}]
        template = ChatTemplate(source, {"t": "a" * 40_000})
        template.render(chat, add_generation_prompt=True)
        found = "rendered"
    except ModelError as error:
        found = error.message
    print(json.dumps([name, found]), flush=True)
"""


@pytest.fixture(scope="module")
def found() -> dict[str, str]:
    """What became of each, all in one process with 1.5 GB of addresses."""
    sources = {name: source for name, (source, _) in HOSTILE.items()}
    ended = subprocess.run(
        [sys.executable, "-c", _RUN], input=json.dumps(sources), capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    return dict(json.loads(line) for line in ended.stdout.splitlines())


@pytest.mark.parametrize("name", HOSTILE)
def test_it_is_stopped_with_its_reason(name: str, found: dict[str, str]) -> None:
    assert HOSTILE[name][1] in found[name]


def test_what_takes_long_is_stopped_by_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    from mule.errors import ModelError
    from mule.tokenizer import sandbox
    from mule.tokenizer.template import ChatTemplate

    monkeypatch.setattr(sandbox, "MAX_SECONDS", 0.2)
    slow = ChatTemplate(
        "{% for a in t %}{% if t | upper | lower | sort %}{% endif %}{% endfor %}",
        {"t": "a" * 9000},
    )
    began = time.monotonic()
    with pytest.raises(ModelError, match=r"it takes more than 0\.2 seconds"):
        slow.render([{"role": "user", "content": "a"}], add_generation_prompt=True)
    assert time.monotonic() - began < MAX_SECONDS
