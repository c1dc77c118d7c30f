"""Lengths of time as people write them."""

from aeolian.domain.errors import InvalidArgument

DAY_S = 24 * 3600.0
MAX_S = 100 * 366 * DAY_S


def duration_s(text: str) -> float:
    """Of `30d` and the like. Raises InvalidArgument."""
    unit_s = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": DAY_S, "w": 7 * DAY_S}.get(text[-1:])
    try:
        number = float(text[:-1])
    except ValueError:
        number = 0.0
    if unit_s is None or not 0 < number * unit_s < MAX_S:
        raise InvalidArgument(f"{text!r} is no time: write 12h, 30d or 4w, up to 100 years")
    return number * unit_s
