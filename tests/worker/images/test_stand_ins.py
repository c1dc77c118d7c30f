"""Which Python stands in for that of a `python:…` image, and on what."""

from pathlib import Path

import pytest

from aeolian.worker.images.references import StandIn
from aeolian.worker.images.stand_ins import Movable, PythonChoice, choose_python, glibc_need, packaged_python

BOTH = ("debian", "ubuntu")


def movable(*glibc):
    return Movable(Path("/tree"), "3.12.4", glibc)


def test_a_copy_of_the_hosts_interpreter_comes_first():
    copied = movable(2, 31)
    choice = choose_python(StandIn("debian", "bookworm", "3.11.2"), "3.11", copied, BOTH)
    assert choice == PythonChoice("debian", "bookworm", "3.11", copied)


def test_a_copy_that_needs_a_newer_c_library_gets_a_newer_suite():
    choice = choose_python(StandIn("debian", "bullseye", "3.12"), "3.12", movable(2, 36), BOTH)
    assert choice.suite == "bookworm"


@pytest.mark.parametrize(
    ("suite", "series", "distributions", "expected"),
    [
        ("bookworm", "3.11", BOTH, ("debian", "bookworm")),
        ("trixie", "3.11", BOTH, ("debian", "bookworm")),
        ("bookworm", "3.13", BOTH, ("debian", "trixie")),
        ("trixie", "3.12", BOTH, ("ubuntu", "noble")),
        ("trixie", "3.12", ("debian",), None),
        ("trixie", "3.14", BOTH, None),
    ],
)
def test_else_the_packages_of_a_suite_that_has_that_series(suite, series, distributions, expected):
    choice = choose_python(StandIn("debian", suite, series), series, None, distributions)
    assert (choice and (choice.distribution, choice.suite)) == expected
    assert choice is None or choice.copied is None


def test_a_copy_that_no_suite_is_new_enough_for_is_not_taken():
    choice = choose_python(StandIn("debian", "bookworm", "3.11"), "3.11", movable(2, 99), BOTH)
    assert choice == PythonChoice("debian", "bookworm", "3.11", None)


def test_what_a_tree_needs_is_read_from_its_libraries(tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python3.12").write_bytes(b"\0GLIBC_2.17\0GLIBC_2.4\0")
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib/libssl.so.3").write_bytes(b"GLIBC_2.34\0GLIBC_PRIVATE\0")
    (tmp_path / "lib/notes.txt").write_bytes(b"GLIBC_2.99")
    assert glibc_need(tmp_path) == (2, 34)


def test_a_packaged_python_stands_where_pip_may_change_what_is_installed():
    command = packaged_python("3.11")
    assert "python3.11 -m venv --copies /usr/local" in command
    assert "python3-pip" not in command, "pip cannot replace what came as a package of the distribution"
