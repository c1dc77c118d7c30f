import json

import pytest

from aeolian.worker.runtimes.seccomp import NAMESPACE_FLAGS, REFUSED, seccomp_profile

DISTRIBUTION = {
    "defaultAction": "SCMP_ACT_ERRNO",
    "defaultErrnoRet": 38,
    "archMap": [],
    "syscalls": [
        {"names": ["read", "mount", "clone", "clone3"], "action": "SCMP_ACT_ALLOW", "args": [], "comment": "", "includes": {}},
        {"names": ["chroot"], "action": "SCMP_ACT_ALLOW", "includes": {"caps": ["CAP_SYS_CHROOT"]}},
        {"names": ["chroot"], "action": "SCMP_ACT_ERRNO", "excludes": {"caps": ["CAP_SYS_CHROOT"]}, "errnoRet": 1},
        {"names": ["bpf"], "action": "SCMP_ACT_ALLOW", "includes": {"caps": ["CAP_SYS_ADMIN"]}},
        {"names": ["bpf"], "action": "SCMP_ACT_ERRNO", "excludes": {"caps": ["CAP_SYS_ADMIN"]}, "errnoRet": 1},
        {"names": ["s390_runtime_instr"], "action": "SCMP_ACT_ALLOW", "includes": {"arches": ["s390"]}},
    ],
}  # fmt: skip


def actions_of(profile) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for entry in profile["syscalls"]:
        for name in entry["names"]:
            found.setdefault(name, []).append(entry["action"])
    return found


@pytest.fixture
def profile(tmp_path):
    path = tmp_path / "seccomp.json"
    path.write_text(json.dumps(DISTRIBUTION))
    return seccomp_profile(["CAP_SYS_CHROOT"], path)


def test_conditions_of_the_distributions_profile_are_decided_here(profile):
    found = actions_of(profile)
    assert profile["defaultErrnoRet"] == 38
    assert found["read"] == found["chroot"] == ["SCMP_ACT_ALLOW"]
    assert found["bpf"] == ["SCMP_ACT_ERRNO"]
    assert "s390_runtime_instr" not in found
    assert {key for entry in profile["syscalls"] for key in entry} <= {"names", "action", "args", "errnoRet"}


def test_mounts_and_namespaces_are_refused_whatever_the_profile_allows(profile):
    found = actions_of(profile)
    assert all(found[name] == ["SCMP_ACT_ERRNO"] for name in (*REFUSED, "clone3"))
    clones = [entry for entry in profile["syscalls"] if "clone" in entry["names"]]
    assert clones == [
        {
            "names": ["clone"],
            "action": "SCMP_ACT_ALLOW",
            "args": [{"index": 0, "value": NAMESPACE_FLAGS, "valueTwo": 0, "op": "SCMP_CMP_MASKED_EQ"}],
        }
    ]


@pytest.mark.parametrize("content", [None, "no json", "[]", '{"defaultAction": "SCMP_ACT_ERRNO"}'])
def test_without_a_profile_that_can_be_used_there_is_one_of_our_own(tmp_path, content):
    path = tmp_path / "seccomp.json"
    if content is not None:
        path.write_text(content)
    profile = seccomp_profile([], path)
    found = actions_of(profile)
    assert profile["defaultAction"] == "SCMP_ACT_ALLOW"
    assert found["bpf"] == found["mount"] == found["kexec_load"] == ["SCMP_ACT_ERRNO"]
    refused = [entry["args"][0]["value"] for entry in profile["syscalls"] if entry["names"] == ["clone"]]
    assert sum(refused) == NAMESPACE_FLAGS
