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


LIMITS = {
    "cpu": {"shares": 2048, "quota": 150_000, "period": 100_000},
    "memory": {"limit": 200 << 20, "swap": 200 << 20},
    "pids": {"limit": 16_384},
}


def test_a_group_of_v1_gets_its_limits_in_the_folder_of_each_controller(tmp_path):
    v1(tmp_path).create("/a/ta-1", LIMITS)
    written = {
        str(path.relative_to(tmp_path)): path.read_text()
        for name in ("cpu", "memory", "pids")
        for path in (tmp_path / name / "a/ta-1").iterdir()
    }
    assert written == {
        "cpu/a/ta-1/cpu.shares": "2048",
        "cpu/a/ta-1/cpu.cfs_period_us": "100000",
        "cpu/a/ta-1/cpu.cfs_quota_us": "150000",
        "memory/a/ta-1/memory.limit_in_bytes": "209715200",
        "memory/a/ta-1/memory.memsw.limit_in_bytes": "209715200",
        "pids/a/ta-1/pids.max": "16384",
    }


def test_a_group_of_v2_gets_its_controllers_from_those_above_and_a_weight_for_its_share(tmp_path):
    tree(tmp_path, {"cgroup.controllers": "cpu memory pids\n"}).create("/a/ta-1", LIMITS)
    written = {path.name: path.read_text() for path in (tmp_path / "a/ta-1").iterdir()}
    assert written == {
        "cpu.weight": "79",
        "cpu.max": "150000 100000",
        "memory.max": "209715200",
        "memory.swap.max": "0",
        "pids.max": "16384",
    }
    assert (tmp_path / "cgroup.subtree_control").exists() and (tmp_path / "a/cgroup.subtree_control").exists()


def test_what_is_not_limited_is_not_written(tmp_path):
    limits = {"cpu": {"shares": 2}, "pids": {"limit": 10}}
    v1(tmp_path / "v1").create("/a", limits)
    assert not list((tmp_path / "v1/memory/a").iterdir())
    tree(tmp_path / "v2", {"cgroup.controllers": "cpu memory pids\n"}).create("/a", limits)
    assert {path.name for path in (tmp_path / "v2/a").iterdir()} == {"cpu.weight", "pids.max"}


@pytest.mark.parametrize("is_unified", [False, True])
def test_a_process_joins_its_group_everywhere(tmp_path, is_unified):
    cgroups = tree(tmp_path, {"cgroup.controllers": ""}) if is_unified else v1(tmp_path)
    cgroups.create("/a/ta-1", LIMITS)
    cgroups.join("/a/ta-1", 42)
    assert cgroups.process_ids("/a/ta-1") == {42}
