"""What changes in a prompt from request to request by itself: dates, times, identifiers."""

from __future__ import annotations

import re

_MONTH = (
    r"(?:Jan(?:uary)?|Feb(?:ruary)?|Mar(?:ch)?|Apr(?:il)?|May|June?|July?|Aug(?:ust)?|"
    r"Sept?(?:ember)?|Oct(?:ober)?|Nov(?:ember)?|Dec(?:ember)?)"
)
_DAY = r"(?:Mon|Tues?|Wed(?:nes)?|Thu(?:rs)?|Fri|Sat(?:ur)?|Sun)(?:day)?"
_CLOCK = r"\d{1,2}:\d{2}(?::\d{2}(?:\.\d+)?)?(?: ?[AaPp]\.?[Mm]\.?)?(?:Z| ?[+-]\d{2}:?\d{2}| UTC)?"
_DATE = (
    r"\d{4}[-/.]\d{1,2}[-/.]\d{1,2}|\d{1,2}[-/]\d{1,2}[-/](?:\d{4}|\d{2})"
    r"|(?:0?[1-9]|[12]\d|3[01])\.(?:0?[1-9]|1[0-2])\.(?:\d{4}|\d{2})"
    rf"|\d{{1,2}}(?:st|nd|rd|th)? {_MONTH}\.?,? \d{{4}}"
    rf"|{_MONTH}\.? \d{{1,2}}(?:st|nd|rd|th)?(?:,? \d{{4}})?|{_MONTH} \d{{4}}"
)
DRIFTS = {
    "a date or time": re.compile(
        rf"(?<![\w.])(?:(?:{_DAY},? )?(?:{_DATE})(?:(?:T|,? (?:at )?){_CLOCK})?|{_DAY}|{_CLOCK}"
        r"|(?:1[5-9]|2\d)\d{8}(?:\d{3})?)(?!\w|\.\d)"
    ),
    "an identifier": re.compile(
        r"(?<!\w)(?:[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}"
        r"|(?=[0-9a-fA-F]*\d)[0-9a-fA-F]{16,64})(?!\w)"
    ),
}
"""What differs from request to request: dates and times as prompts write them, seconds since 1970
too; UUIDs and long hexadecimal numbers."""


def drift(before: str, here: str, earlier: str) -> tuple[str, str, str] | None:
    """What two texts part amid, ``before`` being what they share: its kind, as it is ``here``, as
    it was ``earlier``. None where it is nothing of the kind."""
    for kind, pattern in DRIFTS.items():
        found = [
            match[0]
            for text in (here, earlier)
            for match in pattern.finditer(before + text)
            if match.start() <= len(before) < match.end()
        ]
        if len(found) == 2:
            return kind, found[0], found[1]
    return None
