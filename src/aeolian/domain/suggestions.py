"""What somebody may have meant by a name that does not exist."""

import difflib
from collections.abc import Iterable

MAX_LISTED = 10
SIMILAR = 0.6
ABOUT_AS_GOOD = 0.1
"""Names that share a long beginning all look alike: worse ones than this below the best are left out."""
MIN_PREFIX_LENGTH = 3


def nearest(name: str, names: Iterable[str], limit: int) -> list[str]:
    """Those of `names` that look like `name`, the best first."""
    known = {_plain(one): one for one in sorted(names)}
    wanted = _plain(name)
    if wanted in known:
        return [known[wanted]]
    found = difflib.get_close_matches(wanted, known, n=limit, cutoff=SIMILAR)
    likeness = [difflib.SequenceMatcher(None, one, wanted).ratio() for one in found]
    found = [one for one, ratio in zip(found, likeness, strict=True) if ratio > likeness[0] - ABOUT_AS_GOOD]
    if not found and len(wanted) >= MIN_PREFIX_LENGTH:
        found = [one for one in known if one.startswith(wanted)][:limit]
    return [known[one] for one in found]


def instead_of(name: str, names: Iterable[str]) -> str:
    """To end a sentence about a wrong name: the nearest one, else all of them; "" where there is none."""
    there_are = sorted(names)
    if not there_are:
        return ""
    if near := nearest(name, there_are, 1):
        return f": did you mean '{near[0]}'?"
    listed = ", ".join(there_are[:MAX_LISTED])
    return f" (there {'is' if len(there_are) == 1 else 'are'}: {listed}{', …' if len(there_are) > MAX_LISTED else ''})"


def _plain(name: str) -> str:
    """Case and separators are what is mistyped most."""
    return name.lower().translate(str.maketrans("_.:", "-//")).replace("//", "/")
