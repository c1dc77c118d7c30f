import pytest

from aeolian.control.container_ends import explain
from aeolian.domain.containers import ExitStatus


@pytest.mark.parametrize(
    ("exit", "said"),
    [
        pytest.param(ExitStatus(7), "container ta-1 ended by itself with exit code 7", id="exit"),
        pytest.param(ExitStatus(-11), "container ta-1 was killed by signal 11", id="signal"),
        pytest.param(ExitStatus(-9, True), "container ta-1 ran out of memory and was killed", id="memory"),
        pytest.param(ExitStatus(-9, reason="it was stopped"), "container ta-1 ended: it was stopped", id="reason"),
    ],
)
def test_the_end_of_a_container_is_said_in_words(exit, said):
    assert explain("ta-1", exit).startswith(said)


def test_what_it_wrote_last_follows_the_sentence():
    text = explain("ta-1", ExitStatus(1), ["loading", "no such file"], did="could not start: it")
    assert text == (
        "container ta-1 could not start: it ended by itself with exit code 1\n"
        "The last lines that it wrote:\n    loading\n    no such file"
    )
