import resource
from pathlib import Path

import pytest

from aeolian.domain.containers import Resources
from aeolian.worker.hooks.base import Bind
from aeolian.worker.runtimes import oci_spec as module
from aeolian.worker.runtimes.oci_spec import limits, oci_spec, rlimits


def spec_of(**options):
    fields = {
        "rootfs": Path("/rootfs"),
        "argv": ["python", "-c", "pass"],
        "env": {"A": "b=c", "EMPTY": ""},
        "cwd": "/root",
        "binds": [],
        "hostname": "ta-1",
        "cgroup": "/aeolian-1/ta-1",
        "resources": Resources(),
        "seccomp": {"defaultAction": "SCMP_ACT_ERRNO"},
        "compiled_seccomp": "",
        "pid_namespace": Path("/pid"),
        "network_namespace": None,
        "block_network": False,
        "limits_swap": True,
        **options,
    }
    return oci_spec(**fields)


def namespaces_of(spec) -> dict[str, str | None]:
    return {it["type"]: it.get("path") for it in spec["linux"]["namespaces"]}


@pytest.mark.parametrize(
    ("resources", "limits_swap", "expected"),
    [
        (Resources(), True, {"cpu": {"shares": 128}}),
        (Resources(milli_cpu=1), True, {"cpu": {"shares": 2}}),
        (Resources(milli_cpu_max=250), True, {"cpu": {"shares": 128, "quota": 25_000, "period": 100_000}}),
        (Resources(memory_mb_max=2), True, {"cpu": {"shares": 128}, "memory": {"limit": 2 << 20, "swap": 2 << 20}}),
        (Resources(memory_mb_max=2), False, {"cpu": {"shares": 128}, "memory": {"limit": 2 << 20}}),
    ],
)
def test_resources_become_limits(resources, limits_swap, expected):
    found = limits(resources, limits_swap=limits_swap)
    assert found.pop("pids")["limit"] > 1000
    assert found == expected


def test_the_network_is_the_hosts_an_empty_one_or_one_that_was_prepared():
    assert "network" not in namespaces_of(spec_of())
    assert namespaces_of(spec_of(block_network=True))["network"] is None
    prepared = namespaces_of(spec_of(network_namespace=Path("/run/netns/one"), block_network=True))
    assert prepared["network"] == "/run/netns/one"


def test_processes_mounts_and_names_are_the_containers_own():
    found = namespaces_of(spec_of())
    assert found["pid"] == "/pid"
    assert {"mount", "ipc", "uts", "cgroup"} <= found.keys()


def test_binds_say_whether_they_may_be_written_to():
    binds = [Bind(Path("/on/host"), "/in/container"), Bind(Path("/volume"), "/data", read_only=False)]
    ro, rw = spec_of(binds=binds)["mounts"][-2:]
    assert (ro["source"], ro["destination"]) == ("/on/host", "/in/container")
    assert "ro" in ro["options"] and "rw" in rw["options"]
    assert {"rbind", "nosuid", "nodev"} <= set(ro["options"]) & set(rw["options"])


def test_variables_keep_their_values_whole():
    assert spec_of()["process"]["env"] == ["A=b=c", "EMPTY="]


def test_a_compiled_filter_goes_beside_the_profile_and_never_instead_of_it():
    spec = spec_of(compiled_seccomp="AAAA")
    assert spec["annotations"] == {"run.oci.seccomp_bpf_data": "AAAA"}
    assert spec["linux"]["seccomp"] == {"defaultAction": "SCMP_ACT_ERRNO"}
    assert spec_of()["annotations"] == {}


def test_limits_of_open_files_are_never_above_the_hosts(monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 4096))
    assert rlimits()[0] == {"type": "RLIMIT_NOFILE", "soft": 4096, "hard": 4096}
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, resource.RLIM_INFINITY))
    assert rlimits()[0]["hard"] == 65_536


def test_gpus_are_shown_only_to_containers_that_asked_for_one(monkeypatch):
    node = {"path": "/dev/nvidia0", "type": "c", "major": 195, "minor": 0}
    monkeypatch.setattr(module, "gpu_devices", lambda: [node])
    assert spec_of()["linux"]["devices"] == []
    linux = spec_of(resources=Resources(gpu_count=1))["linux"]
    assert linux["devices"] == [node]
    assert linux["resources"]["devices"] == [
        {"allow": False, "access": "rwm"},
        {"allow": True, "type": "c", "major": 195, "minor": 0, "access": "rw"},
    ]
