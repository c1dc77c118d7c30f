"""When a Function runs by itself: `modal.Cron` and `modal.Period`, as pure functions of time.

Cron follows Vixie's cron, as Debian ships it. A job at fixed hours whose local time is skipped by a change of
the clock runs right after the gap, and one whose local time comes twice runs the first time; a job whose minute or hour
starts with `*` goes by the time that passes.
"""

import calendar
import math
from collections.abc import Iterator
from datetime import UTC, datetime
from zoneinfo import ZoneInfo

import msgspec
from cronsim import CronSim, CronSimError

from aeolian.domain.errors import InvalidArgument

MAX_EXPRESSION_LENGTH = 200
MIN_PERIOD_S = 1.0
MONTH_S = 28 * 86400.0
"""No month is shorter."""
NICKNAMES = {
    "@yearly": "0 0 1 1 *",
    "@annually": "0 0 1 1 *",
    "@monthly": "0 0 1 * *",
    "@weekly": "0 0 * * 0",
    "@daily": "0 0 * * *",
    "@midnight": "0 0 * * *",
    "@hourly": "0 * * * *",
}


class Cron(msgspec.Struct, frozen=True, tag="cron"):
    """Moments by the calendar of a time zone."""

    expression: str
    timezone: str = "UTC"

    def check(self) -> None:
        """Raises InvalidArgument that names what cannot be read."""
        fields = self._fields.split()
        if len(self.expression) > MAX_EXPRESSION_LENGTH or len(fields) != 5:
            raise InvalidArgument(
                f"the cron expression {self.expression[:MAX_EXPRESSION_LENGTH]!r} is not valid: write five fields, "
                "minute, hour, day of month, month and day of week, as in '0 9 * * 1-5'"
            )
        self._zone()
        try:
            moment = next(self._moments(0.0), None)
        except CronSimError as error:
            what = str(error).removeprefix("Bad ")
            raise InvalidArgument(
                f"the cron expression {self.expression!r} is not valid: its {what} is wrong"
            ) from error
        if moment is None:
            raise InvalidArgument(f"the cron expression {self.expression!r} never comes true: no such day exists")

    def next_after(self, after: float, anchor: float = 0.0) -> float:
        """The first moment later than `after` (epoch seconds); infinity when there is none in 50 years."""
        return next((moment for moment in self._moments(after) if moment > after), math.inf)

    def __str__(self) -> str:
        return f"{self.expression} ({self.timezone})"

    @property
    def _fields(self) -> str:
        return NICKNAMES.get(self.expression.strip().lower(), self.expression)

    def _moments(self, after: float) -> Iterator[float]:
        """Near `after` some may be earlier: those of the hour that the clock is turned back."""
        for moment in CronSim(self._fields, datetime.fromtimestamp(math.floor(after), self._zone())):
            yield moment.timestamp()

    def _zone(self) -> ZoneInfo:
        try:
            return ZoneInfo(self.timezone or "UTC")
        except (ValueError, KeyError, OSError) as error:  # what zoneinfo raises depends on how the name is wrong
            raise InvalidArgument(
                f"there is no time zone {self.timezone[:80]!r}: use an IANA name such as 'Europe/Berlin'"
            ) from error


class Period(msgspec.Struct, frozen=True, tag="period"):
    """Moments at equal distances from an anchor. Months and years go by the calendar, in UTC."""

    months: int = 0
    """With the years: 12 each."""
    seconds: float = 0.0
    """With the weeks, days, hours and minutes."""

    def check(self) -> None:
        """Raises InvalidArgument for what is no distance."""
        if not (math.isfinite(self.seconds) and self.months >= 0 and self.seconds >= 0):
            raise InvalidArgument(f"a Period of {self} cannot be followed: give whole, positive numbers")
        if self.months * MONTH_S + self.seconds < MIN_PERIOD_S:
            raise InvalidArgument(f"a Period of {self} is too short: the shortest is {MIN_PERIOD_S:g} s")
        if self.moment(0.0, 1) == math.inf:
            raise InvalidArgument(f"a Period of {self} is too long: its first run would never come")

    def next_after(self, after: float, anchor: float) -> float:
        """The first moment later than `after`, of those that are a multiple of the period after `anchor`."""
        high = 1
        while self.moment(anchor, high) <= after:
            high *= 2
        low = high // 2
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.moment(anchor, middle) <= after else (low, middle)
        return self.moment(anchor, high)

    def moment(self, anchor: float, number: int) -> float:
        """The moment `number` periods after the anchor; where a month has no such day, its last one."""
        try:
            start = datetime.fromtimestamp(anchor, UTC)
            years, month = divmod(start.month - 1 + number * self.months, 12)
            year = start.year + years
            day = min(start.day, calendar.monthrange(year, month + 1)[1])
            moment = start.replace(year=year, month=month + 1, day=day)
        except (ValueError, OverflowError):
            return math.inf
        return moment.timestamp() + number * self.seconds

    def __str__(self) -> str:
        parts = [f"{self.months} months"] if self.months else []
        if self.seconds or not parts:
            parts.append(f"{self.seconds:g} s")
        return "every " + " and ".join(parts)


Schedule = Cron | Period


class ScheduledFunction(msgspec.Struct, frozen=True):
    """A Function of a deployed App that runs by itself."""

    function_id: str
    app_id: str
    schedule: Schedule
    anchor_at: float
    """When it was deployed: a Period counts from there."""
    next_at: float
    """The moment that it runs at next, whether or not it has passed."""

    def after_run(self, now: float) -> "ScheduledFunction":
        """As it is once `next_at` has had its run: what was missed meanwhile is not made up for."""
        next_at = self.schedule.next_after(max(now, self.next_at), self.anchor_at)
        return msgspec.structs.replace(self, next_at=next_at)


def deployed(
    function_id: str, app_id: str, schedule: Schedule, now: float, before: ScheduledFunction | None
) -> ScheduledFunction:
    """The Function as it is deployed now. A Period starts anew; a Cron that has not changed goes on."""
    if before is not None and before.schedule == schedule and isinstance(schedule, Cron):
        return before
    return ScheduledFunction(function_id, app_id, schedule, now, schedule.next_after(now, now))
