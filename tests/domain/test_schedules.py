import itertools
import math
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aeolian.domain.errors import InvalidArgument
from aeolian.domain.schedules import Cron, Period, deployed

ZONES = (
    "UTC",
    "Europe/Berlin",
    "America/New_York",
    "America/St_Johns",
    "America/Sao_Paulo",
    "Australia/Lord_Howe",
    "Africa/Cairo",
    "Asia/Kolkata",
    "Asia/Tehran",
    "Pacific/Apia",
    "Pacific/Chatham",
)


def at(text: str, timezone: str = "UTC") -> float:
    return datetime.fromisoformat(text).replace(tzinfo=ZoneInfo(timezone)).timestamp()


def runs(schedule, after: float, count: int, anchor: float = 0.0) -> list[str]:
    """The next runs, in UTC."""
    found = []
    for _ in range(count):
        after = schedule.next_after(after, anchor)
        found.append(datetime.fromtimestamp(after, UTC).strftime("%Y-%m-%d %H:%M:%S"))
    return found


@pytest.mark.parametrize(
    ("expression", "timezone", "after", "expected"),
    [
        ("*/15 * * * *", "UTC", "2026-01-01T00:07", ["2026-01-01 00:15:00", "2026-01-01 00:30:00"]),
        ("0 9 * * 1-5", "UTC", "2026-01-02T09:00", ["2026-01-05 09:00:00", "2026-01-06 09:00:00"]),
        ("0 6 * * *", "America/New_York", "2026-07-01T00:00", ["2026-07-01 10:00:00", "2026-07-02 10:00:00"]),
        ("0 0 29 2 *", "UTC", "2026-01-01T00:00", ["2028-02-29 00:00:00", "2032-02-29 00:00:00"]),
        ("0 0 13 * FRI", "UTC", "2026-02-01T00:00", ["2026-02-06 00:00:00", "2026-02-13 00:00:00"]),
        ("@weekly", "UTC", "2026-01-01T00:00", ["2026-01-04 00:00:00", "2026-01-11 00:00:00"]),
        # Berlin: 02:00 to 03:00 is skipped on 29 March, 02:00 to 03:00 comes twice on 25 October.
        ("30 2 * * *", "Europe/Berlin", "2026-03-28T12:00", ["2026-03-29 01:00:00", "2026-03-30 00:30:00"]),
        ("30,45 2 * * *", "Europe/Berlin", "2026-03-28T12:00", ["2026-03-29 01:00:00", "2026-03-30 00:30:00"]),
        ("30 2 * * *", "Europe/Berlin", "2026-10-24T12:00", ["2026-10-25 00:30:00", "2026-10-26 01:30:00"]),
        ("30 2 * * *", "Europe/Berlin", "2026-10-25T00:30", ["2026-10-26 01:30:00"]),
        ("30 2 * * *", "Europe/Berlin", "2026-10-25T01:10", ["2026-10-26 01:30:00"]),
        ("*/30 * * * *", "Europe/Berlin", "2026-03-29T00:20", ["2026-03-29 00:30:00", "2026-03-29 01:00:00"]),
        ("0 * * * *", "Europe/Berlin", "2026-10-24T23:30", ["2026-10-25 00:00:00", "2026-10-25 01:00:00"]),
        # Cairo has no midnight on 24 April.
        ("0 0 * * *", "Africa/Cairo", "2026-04-23T12:00", ["2026-04-23 22:00:00", "2026-04-24 21:00:00"]),
    ],
)
def test_a_cron_job_runs_when_vixie_s_cron_runs_it(expression, timezone, after, expected):
    assert runs(Cron(expression, timezone), at(after), len(expected)) == expected


@given(
    st.sampled_from(ZONES),
    st.integers(0, 59),
    st.integers(0, 23),
    st.datetimes(datetime(2000, 1, 1), datetime(2035, 1, 1)),
)
def test_a_daily_job_runs_once_for_each_day_of_its_zone(timezone, minute, hour, start):
    cron, moment = Cron(f"{minute} {hour} * * *", timezone), start.replace(tzinfo=UTC).timestamp()
    moments = []
    for _ in range(5):
        moment = cron.next_after(moment)
        moments.append(moment)
    days = [datetime.fromtimestamp(moment, ZoneInfo(timezone)).date() for moment in moments]
    for (early, before), (late, after) in itertools.pairwise(zip(moments, days, strict=True)):
        assert late > early
        # Apia left out a whole day: its jobs then run right after it, with those of the next one.
        assert after - before == timedelta(days=1) or timezone == "Pacific/Apia"
    for moment in moments:
        local = datetime.fromtimestamp(moment, ZoneInfo(timezone))
        asked = local.replace(minute=minute, hour=hour, fold=0)
        is_skipped = asked.astimezone(UTC).astimezone(asked.tzinfo) != asked
        assert (local.hour, local.minute) == (hour, minute) or is_skipped or timezone == "Pacific/Apia"


@given(
    st.sampled_from(ZONES),
    st.sampled_from(["* * * * *", "*/7 * * * *", "0 */5 * * *", "*/20 1-3 * * *", "15 1,2,3 * * 0", "@monthly"]),
    st.datetimes(datetime(2000, 1, 1), datetime(2035, 1, 1)),
)
def test_the_next_run_is_always_later_and_the_same_wherever_one_asks_from(timezone, expression, start):
    cron, after = Cron(expression, timezone), start.replace(microsecond=0, tzinfo=UTC).timestamp()
    first = cron.next_after(after)
    assert after < first < math.inf
    for part in (0.25, 0.5, 0.999):
        assert cron.next_after(after + part * (first - after)) == first
    assert cron.next_after(first) > first


@pytest.mark.parametrize(
    ("cron", "said"),
    [
        (Cron("0 25 * * *"), r"'0 25 \* \* \*' is not valid: its hour is wrong"),
        (Cron("* * * *"), "write five fields"),
        (Cron("0 0 * * * *"), "write five fields"),
        (Cron("@reboot"), "'@reboot' is not valid"),
        (Cron("0 0 30 2 *"), "its day-of-month is wrong"),
        (Cron("* * */20 * 1L"), "never comes true"),
        (Cron("0 0 * * *", "Mars/Olympus"), "no time zone 'Mars/Olympus'"),
        (Cron("0 0 * * *", "America"), "no time zone 'America'"),
        (Cron("0 0 * * *", "../../etc/passwd"), "no time zone"),
        (Cron("1," * 1000 + "1 * * * *"), "write five fields"),
    ],
)
def test_what_cannot_be_read_is_named(cron, said):
    with pytest.raises(InvalidArgument, match=said):
        cron.check()


@given(st.text("0123456789*/,-L#WMONJAFRIdy@? \n\0", max_size=30), st.text(max_size=12))
def test_any_text_is_read_or_refused(expression, timezone):
    try:
        Cron(expression, timezone).check()
    except InvalidArgument:
        return
    assert Cron(expression, timezone).next_after(0.0) > 0


@pytest.mark.parametrize(
    ("period", "anchor", "expected"),
    [
        (Period(seconds=3600), "2026-01-01T00:10", ["2026-01-01 01:10:00", "2026-01-01 02:10:00"]),
        (Period(seconds=math.pi), "2026-01-01T00:00", ["2026-01-01 00:00:03", "2026-01-01 00:00:06"]),
        (Period(months=1), "2026-01-31T08:00", ["2026-02-28 08:00:00", "2026-03-31 08:00:00", "2026-04-30 08:00:00"]),
        (Period(months=12, seconds=86400), "2024-02-29T00:00", ["2025-03-01 00:00:00", "2026-03-02 00:00:00"]),
    ],
)
def test_a_period_counts_from_its_anchor(period, anchor, expected):
    assert runs(period, at(anchor), len(expected), at(anchor)) == expected


@given(
    st.builds(Period, months=st.integers(0, 30), seconds=st.floats(1, 1e7)),
    st.floats(0, 2e9),
    st.floats(0, 1e9),
)
def test_the_next_multiple_of_a_period_is_found(period, anchor, later):
    after = anchor + later
    moment = period.next_after(after, anchor)
    assert moment > after
    number = next(number for number in itertools.count(1) if number > 5 or period.moment(anchor, number) > after)
    if number <= 5:
        assert moment == period.moment(anchor, number)
    assert period.next_after(moment, anchor) > moment


@pytest.mark.parametrize(
    "period",
    [Period(), Period(seconds=0.5), Period(seconds=math.nan), Period(seconds=math.inf), Period(months=12 * 9000)],
)
def test_a_period_that_cannot_be_followed_is_refused(period):
    with pytest.raises(InvalidArgument, match="Period"):
        period.check()


def test_what_was_missed_has_one_run_and_then_all_goes_on():
    function = deployed("fu-1", "ap-1", Period(seconds=60), 1000.0, None)
    assert function.next_at == 1060
    assert function.after_run(1061.0).next_at == 1120
    assert function.after_run(5000.0).next_at == 5020


def test_a_clock_that_steps_back_repeats_no_moment():
    function = deployed("fu-1", "ap-1", Period(seconds=60), 1000.0, None)
    assert function.after_run(500.0).next_at == 1120


def test_deploying_again_starts_a_period_anew_and_lets_a_cron_go_on():
    every = deployed("fu-1", "ap-1", Period(seconds=60), 1000.0, None)
    assert deployed("fu-1", "ap-1", Period(seconds=60), 1050.0, every).next_at == 1110
    hourly = deployed("fu-1", "ap-1", Cron("@hourly"), 1000.0, None)
    assert deployed("fu-1", "ap-1", Cron("@hourly"), 3700.0, hourly) is hourly
    assert deployed("fu-1", "ap-1", Cron("30 * * * *"), 1000.0, hourly).next_at == 1800
