"""Calls, driven by the official client. The programs are in `programs/`; each says what it checks."""

import shutil
import sys
from pathlib import Path

PROGRAMS = Path(__file__).parent / "programs"


def run(aeolian, folder: Path, program: str, call: str = "run()", **kwargs) -> str:
    for path in PROGRAMS.glob("*.py"):
        shutil.copy(path, folder)
    return aeolian.run(
        sys.executable, "-W", "ignore", "-c", f"import {program}; {program}.{call}", cwd=folder, **kwargs
    )


def test_a_program_sees_what_its_functions_print_and_return(aeolian, tmp_path):
    output = aeolian.run_app(
        """
        import modal

        app = modal.App("squares")

        @app.function()
        def square(x):
            print("squaring", x)
            return x * x

        @app.local_entrypoint()
        def main():
            assert square.remote(7) == 49
            assert square.local(7) == 49
            assert list(square.map(range(100))) == [x * x for x in range(100)]
            print("all is well")
        """,
        tmp_path,
    )
    assert "all is well" in output
    assert "squaring 7\n" in output


def test_functions_are_called_in_every_way(aeolian, tmp_path):
    assert "all is well" in run(aeolian, tmp_path, "calls_basics")


def test_cbor_is_as_good_as_pickle(aeolian, tmp_path):
    assert "all is well" in run(aeolian, tmp_path, "calls_basics", env={"MODAL_PAYLOAD_FORMAT": "cbor"})


def test_failures_are_told_as_they_happened(aeolian, tmp_path):
    assert "all is well" in run(aeolian, tmp_path, "calls_errors")


def test_timeouts_retries_and_cancellation(aeolian, tmp_path):
    assert "all is well" in run(aeolian, tmp_path, "calls_limits")
