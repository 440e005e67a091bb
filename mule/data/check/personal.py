"""Strings that look like somebody's: addresses, numbers, keys. Counted, and shown masked."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from mule.data.check.findings import Finding, Problem, Severity, counted
from mule.data.check.row import CheckRow

# Names and numbers reserved for examples: documentation and code are full of them.
_EXAMPLE_DOMAIN = re.compile(
    r"(?:^|\.)(?:example|test|invalid|localhost|domain|company|email|yourdomain|mail)"
    r"(?:\.\w+)?$|^(?:abc|xyz|foo|bar|site)\.",
    re.IGNORECASE,
)
_TEST_CARDS = frozenset(
    "4111111111111111 4242424242424242 5555555555554444 4012888888881881 5105105105105100 "
    "378282246310005 371449635398431 6011111111111117".split()
)
_KNOWN_ADDRESSES = frozenset(  # public resolvers, and what people type for "some address"
    ("8.8.8.8", "8.8.4.4", "1.1.1.1", "1.0.0.1", "9.9.9.9", "123.45.67.89", "123.123.123.123")
)
_EXAMPLE_SSNS = frozenset(("123-45-6789", "078-05-1120", "987-65-4321", "111-11-1111"))
_PLACEHOLDER = re.compile(r"example|your|xxx|placeholder|dummy|sample|0000|1234567|abcdef", re.I)
_MIN_KEY_CHARACTERS = 10  # different ones in a random key of 20 or more: fewer is a placeholder


@dataclass(frozen=True, slots=True)
class _Kind:
    """A kind of string: how it is found, and what makes a match real."""

    code: str
    what: str
    severity: Severity
    pattern: re.Pattern[str]
    clue: Callable[[str], bool]  # cheap: False where the pattern cannot match
    is_real: Callable[[str], bool]


def _has_digit(text: str) -> bool:
    return _DIGITS.search(text) is not None


_DIGITS = re.compile(r"\d{3}")


def _real_email(found: str) -> bool:
    return _EXAMPLE_DOMAIN.search(found.rpartition("@")[2]) is None


def _real_phone(found: str) -> bool:
    digits = re.sub(r"\D", "", found)
    # 555 is reserved for films, 1234567 is what people type.
    fictional = "555" in (digits[-7:-4], digits[-10:-7]) or "1234567" in digits
    return 9 <= len(digits) <= 15 and not fictional and len(set(digits)) > 3


def _real_card(found: str) -> bool:
    digits = re.sub(r"\D", "", found)
    if digits in _TEST_CARDS or len(set(digits)) < 4:
        return False
    doubled = [int(d) * (1 + place % 2) for place, d in enumerate(reversed(digits))]
    return sum(d - 9 * (d > 9) for d in doubled) % 10 == 0  # Luhn's checksum


def _real_iban(found: str) -> bool:
    compact = found.replace(" ", "")
    if not 15 <= len(compact) <= 34:
        return False
    number = "".join(str(int(character, 36)) for character in compact[4:] + compact[:4])
    return int(number) % 97 == 1  # ISO 7064, as ISO 13616 prescribes


def _real_address(found: str) -> bool:
    try:
        address = ipaddress.IPv4Address(found)
    except ValueError:
        return False
    version = max(address.packed) < 20  # 1.2.3.4 and 10.4.1.2 are versions or examples
    return address.is_global and not version and found not in _KNOWN_ADDRESSES


def _real_ssn(found: str) -> bool:
    area, group, serial = found.split("-")
    if found in _EXAMPLE_SSNS or area in ("000", "666") or area >= "900":
        return False
    return group != "00" and serial != "0000"


def _real_key(found: str) -> bool:
    """Random-looking: mixed characters, and no word that marks an example."""
    mixed = any(c.isdigit() for c in found) and any(c.isalpha() for c in found)
    return mixed and len(set(found)) >= _MIN_KEY_CHARACTERS and not _PLACEHOLDER.search(found)


def _always(_: str) -> bool:
    return True


_KINDS = (
    _Kind(
        "secret-key",
        "a private key",
        "error",
        re.compile(
            r"-----BEGIN (?:[A-Z]+ )?PRIVATE KEY-----\s+(?:[\w-]+: [^\n]*\s+)*[A-Za-z0-9+/=]{40}"
        ),
        lambda text: "PRIVATE KEY-----" in text,
        _always,
    ),
    _Kind(
        "secret-token",
        "an API key or access token",
        "error",
        re.compile(
            r"(?<![\w-])(?:sk-[A-Za-z0-9_-]{20,}|(?:AKIA|ASIA)[0-9A-Z]{16}|gh[pousr]_[A-Za-z0-9]{36}"
            r"|github_pat_\w{22,}|hf_[A-Za-z0-9]{30,}|xox[abprs]-[A-Za-z0-9-]{20,}"
            r"|AIza[\w-]{35}|eyJ[\w-]{15,}\.eyJ[\w-]{15,}\.[\w-]{20,})(?![\w-])"
        ),
        lambda text: any(
            clue in text for clue in ("sk-", "AKIA", "ASIA", "gh", "hf_", "xox", "AIza", "eyJ")
        ),
        _real_key,
    ),
    _Kind(
        "pii-card",
        "a payment card number",
        "warning",
        re.compile(
            r"(?<![\d.,$-])(?<!\d )(?:(?:4\d{3}|5[1-5]\d\d|2[2-7]\d\d|6011|65\d\d)(?P<gap>[ -]?)\d{4}"
            r"(?P=gap)\d{4}(?P=gap)\d{4}|3[47]\d\d(?P<wide>[ -]?)\d{6}(?P=wide)\d{5})"
            r"(?![\d-]|[.,]\d| \d)"
        ),
        _has_digit,
        _real_card,
    ),
    _Kind(
        "pii-iban",
        "a bank account (IBAN)",
        "warning",
        re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,4})?\b"),
        _has_digit,
        _real_iban,
    ),
    _Kind(
        "pii-ssn",
        "a US social security number",
        "warning",
        re.compile(r"(?<![\d-])\d{3}-\d{2}-\d{4}(?![\d-])"),
        _has_digit,
        _real_ssn,
    ),
    _Kind(
        "pii-email",
        "an e-mail address",
        "warning",
        re.compile(r"\b[A-Za-z0-9._%+-]{1,64}@(?:[A-Za-z0-9-]{1,63}\.)+[A-Za-z]{2,24}\b"),
        lambda text: "@" in text,
        _real_email,
    ),
    _Kind(
        "pii-phone",
        "a phone number",
        "warning",
        re.compile(
            r"(?<![\w.+/=-])(?:\+[1-9]\d{0,2}[ .-]?(?:\(\d{1,4}\)[ .-]?)?\d{1,4}(?:[ .-]?\d{2,4}){2,4}"
            r"|\(\d{3}\) ?\d{3}[ .-]\d{4}|\d{3}([.-])\d{3}\1\d{4})(?![\w/=-])(?!\.\d)"
        ),
        _has_digit,
        _real_phone,
    ),
    _Kind(
        "pii-ip",
        "a public IP address",
        "warning",
        re.compile(r"(?<![\w.-])(?:\d{1,3}\.){3}\d{1,3}(?![\w-]|\.\d)"),
        lambda text: "." in text and _DIGIT.search(text) is not None,
        _real_address,
    ),
)
_DIGIT = re.compile(r"\d\.\d")
_HINTS: dict[Severity, str] = {
    "error": "take it out, and revoke it: a model repeats what it has learned by heart",
    "warning": "remove or replace it, unless the model is meant to say it to anybody",
}


def personal_strings(text: str) -> Iterator[tuple[str, int, str]]:
    """(code, position, masked) of each string in `text` that looks like somebody's."""
    for kind in _KINDS:
        if kind.clue(text):
            for match in kind.pattern.finditer(text):
                if kind.is_real(match[0]):
                    yield kind.code, match.start(), mask(kind.code, match[0])


def mask(code: str, found: str) -> str:
    """What kind of string it is, without what is secret in it."""
    if code == "secret-key":
        return found.split("\n")[0]
    if code == "pii-email":
        name, _, domain = found.partition("@")
        return f"{name[0]}***@{domain[0]}***.{domain.rpartition('.')[2]}"
    return f"{found[:4].strip()}***"


class Personal:
    """Counts them over all rows."""

    def __init__(self) -> None:
        self._findings: dict[str, Finding] = {}

    def add(self, row: CheckRow) -> None:
        seen: set[str] = set()  # a row counts once for each kind
        for text in row.texts:
            for code, position, masked in personal_strings(text):
                if code not in seen:
                    seen.add(code)
                    finding = self._findings.setdefault(code, Finding())
                    finding.add(row.place(masked, position, text))

    def problems(self) -> Iterator[Problem]:
        for kind in _KINDS:
            if (finding := self._findings.get(kind.code)) is not None:
                message = f"{counted(finding.count, 'row')} with {kind.what}"
                yield Problem(kind.severity, kind.code, message, _HINTS[kind.severity], finding)
