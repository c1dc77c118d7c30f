"""Calls, driven by the official client. The programs are in `programs/`; each says what it checks."""

import json
import shutil
import sys
from pathlib import Path

import pytest

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


def test_inputs_share_containers_as_functions_ask(aeolian, tmp_path):
    assert "all is well" in run(aeolian, tmp_path, "calls_containers")


def test_containers_call_others_without_getting_stuck(aeolian, tmp_path):
    assert "all is well" in run(aeolian, tmp_path, "calls_nested")


def test_payloads_of_every_size_and_generators(aeolian, tmp_path):
    assert "all is well" in run(aeolian, tmp_path, "calls_payloads")


def test_large_payloads_pass_without_taking_memory(aeolian, tmp_path):
    before = aeolian.memory_mib()
    assert "all is well" in run(aeolian, tmp_path, "calls_payloads", "send_and_return(100)")
    assert aeolian.memory_mib() - before < 60


@pytest.mark.slow
def test_a_gibibyte_passes_without_taking_memory(aeolian, tmp_path):
    before = aeolian.memory_mib()
    assert "all is well" in run(aeolian, tmp_path, "calls_payloads", "send_and_return(1024)", timeout_s=600)
    assert aeolian.memory_mib() - before < 100


def test_calls_outlive_the_program_that_made_them_and_the_server(aeolian, tmp_path):
    shutil.copy(PROGRAMS / "calls_later.py", tmp_path)
    aeolian.modal("deploy", "calls_later.py", cwd=tmp_path)
    ids = json.loads(run(aeolian, tmp_path, "calls_later", "begin()"))
    run(aeolian, tmp_path, "calls_later", f"look({ids})")
    aeolian.stop()
    aeolian.start()
    run(aeolian, tmp_path, "calls_later", f"look({ids})")
    run(aeolian, tmp_path, "calls_later", f"finish({ids})")
    aeolian.modal("app", "stop", "--yes", "calls-later")


def test_an_interrupted_map_leaves_nothing_running(aeolian, tmp_path):
    output = run(aeolian, tmp_path, "calls_later", "map_until_interrupted()", ok=False)
    assert "interrupted" in output and "not interrupted" not in output
    assert not [container for container in aeolian.modal_json("container", "list") if "calls-later" in str(container)]
