"""Containers come and go as there is work, and crash loops are told and slowed down."""

import re
import shutil
import sys
from pathlib import Path

PROGRAMS = Path(__file__).parent / "programs"


def run(aeolian, folder: Path, call: str) -> str:
    return aeolian.run(sys.executable, "-W", "ignore", "-c", f"import {call.split('.')[0]}; {call}()", cwd=folder)


def copied(folder: Path, *names: str) -> None:
    for name in names:
        shutil.copy(PROGRAMS / f"{name}.py", folder)


def test_containers_follow_the_work(aeolian, tmp_path):
    copied(tmp_path, "scaling_app", "scaling")
    aeolian.modal("deploy", "scaling_app.py", cwd=tmp_path)
    printed = run(aeolian, tmp_path, "scaling.run")
    assert "all is well" in printed
    assert int(re.search(r"containers for a burst: (\d+)", printed)[1]) <= 20, "a thousand short inputs started a crowd"
    aeolian.modal_session(
        ("function autoscaler settings scaling/warm", "Overridden By"),
        ("function autoscaler update scaling/warm --max-containers 3 --min-containers 1", "Updated autoscaler"),
        ("function autoscaler settings scaling/warm --json", '"max_containers": 3'),
        ("! function autoscaler update scaling/warm --min-containers 4", "cannot be above max_containers (3)"),
        ("function stats scaling/quick", ",000 succeeded (100.0%) · 0 failed"),
        ("function stats scaling/Model.* --all-variants --json", '"variant_count": 3'),
        ("function calls scaling/quick --tail 3", "Displaying 3 rows"),
        ("function variants scaling/Model.*", "3 busiest"),
        ("app stats scaling", "Model.*"),
        ("app stop scaling --yes", ""),
    )


def test_crash_loops_are_told_and_a_fixed_version_starts_at_once(aeolian, tmp_path):
    copied(tmp_path, "crashing_app", "crashing")
    aeolian.modal("deploy", "crashing_app.py", cwd=tmp_path)
    assert "all is well" in run(aeolian, tmp_path, "crashing.run")
    lines = aeolian.modal("app", "logs", "crashing")
    assert "the licence has expired" in lines
    assert re.search(r"could not start: it ended by itself with exit code 7; .* the next one is started in 4 s", lines)
    source = tmp_path / "crashing_app.py"
    source.write_text(source.read_text().replace("os._exit(7)", "pass"))
    aeolian.modal("deploy", "crashing_app.py", cwd=tmp_path)
    assert "answered after" in run(aeolian, tmp_path, "crashing.run_fixed")
    aeolian.modal("app", "stop", "crashing", "--yes")
