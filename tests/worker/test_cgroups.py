import subprocess

import pytest

from aeolian.worker.cgroups import CgroupKind, Cgroups


def tree(root, files):
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return Cgroups(root)


def v1(root, **more):
    return tree(root, {f"{name}/cgroup.procs": "" for name in ("cpu", "memory", "pids")} | more)


def test_the_kind_is_told_by_what_is_mounted(tmp_path):
    assert Cgroups(tmp_path / "none").kind is CgroupKind.NONE
    assert v1(tmp_path / "v1").kind is CgroupKind.V1
    assert v1(tmp_path / "hybrid", **{"unified/cgroup.procs": ""}).kind is CgroupKind.HYBRID
    assert tree(tmp_path / "v2", {"cgroup.controllers": "cpu memory pids\n"}).kind is CgroupKind.V2


def test_missing_controllers_are_named(tmp_path):
    assert v1(tmp_path / "v1").missing_controllers() == []
    assert tree(tmp_path / "some", {"cpu/cgroup.procs": ""}).missing_controllers() == ["memory", "pids"]
    assert tree(tmp_path / "v2", {"cgroup.controllers": "cpuset cpu io\n"}).missing_controllers() == ["memory", "pids"]


@pytest.mark.parametrize(
    "files",
    [
        {
            "memory/cgroup.procs": "",
            "memory/a/ta-1/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 3\n",
        },
        {"cgroup.controllers": "", "a/ta-1/memory.events": "low 0\nmax 12\noom 4\noom_kill 3\noom_group_kill 0\n"},
    ],
)
def test_kills_for_want_of_memory_are_counted(tmp_path, files):
    cgroups = tree(tmp_path, files)
    assert cgroups.num_oom_kills("/a/ta-1") == 3
    assert cgroups.num_oom_kills("/a/gone") == 0


def test_processes_of_all_hierarchies_and_of_groups_below_are_found_and_killed(tmp_path):
    process = subprocess.Popen(["sleep", "600"])
    files = {"memory/a/ta-1/cgroup.procs": f"{process.pid}\n", "cpu/a/ta-1/deep/cgroup.procs": f"{process.pid}\n"}
    cgroups = v1(tmp_path, **files)
    assert cgroups.process_ids("/a") == {process.pid}
    assert not cgroups.kill("/a", 0.02), "the files of this test do not change when a process ends"
    assert process.wait() == -9


def test_empty_groups_are_removed_and_others_stay(tmp_path):
    cgroups = v1(tmp_path, **{"memory/other/ta-9/cgroup.procs": ""})
    for folder in ("memory/a/ta-1/deep", "cpu/a/ta-1"):
        (tmp_path / folder).mkdir(parents=True)
    cgroups.remove("/a")
    assert not (tmp_path / "memory/a").exists() and not (tmp_path / "cpu/a").exists()
    assert (tmp_path / "memory/other/ta-9").is_dir()
    cgroups.remove("/a")


def test_a_link_to_another_controller_is_no_hierarchy_of_its_own(tmp_path):
    cgroups = v1(tmp_path)
    (tmp_path / "cpuacct").symlink_to("cpu")
    assert sorted(folder.name for folder in cgroups.hierarchies()) == ["cpu", "memory", "pids"]
