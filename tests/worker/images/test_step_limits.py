import subprocess

from aeolian.worker.cgroups import Cgroups
from aeolian.worker.images.step_limits import StepLimits


def made_up(root) -> Cgroups:
    for name in ("cpu", "memory", "pids"):
        (root / name).mkdir(parents=True)
        (root / name / "cgroup.procs").touch()
    return Cgroups(root)


def test_a_step_is_in_a_group_with_limits_while_it_runs(tmp_path):
    limits = StepLimits(tmp_path / "data", made_up(tmp_path / "cgroups"))
    with limits.around(42), limits.around(43):
        (parent,) = (tmp_path / "cgroups/pids").glob("aeolian-*-builds")
        for number, pid in ((1, 42), (2, 43)):
            assert (parent / str(number) / "cgroup.procs").read_text() == str(pid)
            assert int((parent / str(number) / "pids.max").read_text()) > 1000
        (memory,) = (tmp_path / "cgroups/memory").glob("aeolian-*-builds/1/memory.limit_in_bytes")
        assert int(memory.read_text()) > 1 << 20


def test_a_host_without_cgroups_has_no_limits(tmp_path):
    limits = StepLimits(tmp_path / "data", Cgroups(tmp_path / "none"))
    assert not limits.are_there
    with limits.around(42):
        pass


def test_nothing_is_left_of_the_groups_of_this_host(tmp_path):
    limits = StepLimits(tmp_path)
    process = subprocess.Popen(["sleep", "600"])
    try:
        with limits.around(process.pid):
            process.kill()
            process.wait()
    finally:
        process.kill()
    assert not [folder for root in Cgroups().hierarchies() if (folder := root / limits._parent.strip("/")).exists()]
