"""What somebody may have meant by a name that does not exist."""

import difflib
from collections.abc import Iterable

MAX_LISTED = 10


def instead_of(name: str, names: Iterable[str]) -> str:
    """To end a sentence about a wrong name: the nearest one, else all of them; "" where there is none."""
    there_are = sorted(names)
    if not there_are:
        return ""
    by_lower_case = {known.lower(): known for known in there_are}
    near = difflib.get_close_matches(name.lower(), by_lower_case, n=1, cutoff=0.6)
    if near:
        return f": did you mean '{by_lower_case[near[0]]}'?"
    listed = ", ".join(there_are[:MAX_LISTED])
    return f" (there {'is' if len(there_are) == 1 else 'are'}: {listed}{', …' if len(there_are) > MAX_LISTED else ''})"
