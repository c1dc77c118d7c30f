import pytest

from aeolian.cli.durations import duration_s
from aeolian.domain.errors import InvalidArgument


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("5m", 300), ("1.5h", 5400), ("30d", 2592000), ("1w", 604800)]
)
def test_times_are_written_with_their_unit(text, seconds):
    assert duration_s(text) == seconds


@pytest.mark.parametrize("text", ["", "d", "30", "-1d", "0h", "nand", "infd", "9999999w", "1y"])
def test_what_is_no_time_is_refused(text):
    with pytest.raises(InvalidArgument, match="30d"):
        duration_s(text)
