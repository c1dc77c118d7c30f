import pytest

from aeolian.domain.errors import InvalidArgument
from aeolian.domain.roles import RULES, Right, Role, is_audited, role_named


def test_each_role_gives_the_rights_of_those_before_it():
    assert Role.NO_ACCESS < Role.VIEWER < Role.CONTRIBUTOR < Role.MANAGER
    assert (Right.READ, Right.WRITE, Right.MANAGE) == (Role.VIEWER, Role.CONTRIBUTOR, Role.MANAGER)


def test_roles_are_written_as_people_write_them():
    assert role_named("No_Access ") is Role.NO_ACCESS
    assert [role_named(role.label) for role in Role] == list(Role)
    with pytest.raises(InvalidArgument, match="'owner' is no role: use one of manager, contributor, viewer"):
        role_named("owner")


def test_containers_that_are_shut_off_can_do_their_own_work_and_nothing_that_reaches_others():
    own = {name for name, rule in RULES.items() if rule.for_restricted}
    assert {"FunctionGetInputs", "FunctionPutOutputs", "ContainerHeartbeat", "TaskResult", "BlobCreate"} <= own
    others = {name for name in own if RULES[name].right is not Right.CONTAINER} - {"FunctionCallGetDataIn"}
    assert not any(name.startswith(("App", "Dict", "Function", "Queue", "Sandbox", "Secret")) for name in others)


def test_the_audit_trail_tells_of_changes_and_not_of_looking_and_calling():
    told = ("SecretDelete", "AppPublish", "EnvironmentRoleSet", "TokenDelete", "VolumePutFiles2", "ContainerStop")
    assert all(map(is_audited, told))
    assert not any(map(is_audited, ("SecretList", "FunctionMap", "AppHeartbeat", "QueuePut", "FunctionPutOutputs")))
