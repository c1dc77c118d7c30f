"""That nothing is forgotten: every RPC has a rule, and every request says where it is about."""

import pytest
from google.protobuf.descriptor import Descriptor
from google.protobuf.message_factory import GetMessageClass
from modal_proto import api_pb2

from aeolian.domain.caller import Caller
from aeolian.domain.errors import PermissionDenied
from aeolian.domain.roles import RULES, Right
from aeolian.protocol.guard import NOT_IDS, check_kind, ids_in, is_id
from aeolian.protocol.service import SERVICE

METHODS = {method.name: method for method in SERVICE.methods}
CONTAINER = Caller(workspace="local", task_id="ta-1", environment_name="main")


def test_every_rpc_has_a_rule_and_there_are_no_others():
    assert RULES.keys() == METHODS.keys()


def test_an_rpc_without_a_rule_is_refused():
    with pytest.raises(PermissionDenied, match="nobody has said who may call Invented"):
        check_kind("Invented", None, Caller(workspace="local", token_id="ak-1"))


@pytest.mark.parametrize("name", sorted(RULES))
def test_the_request_of_each_rpc_says_which_environment_it_is_about(name):
    rule, fields = RULES[name], METHODS[name].input_type.fields_by_name
    if rule.anywhere or rule.right not in (Right.READ, Right.WRITE, Right.MANAGE):
        return
    named = [field for field in (*rule.environments, *rule.image_names, "function_call_jwt") if field in fields]
    assert named or any(is_id(field) for field in fields)


def test_every_field_that_may_be_an_id_is_taken_for_one():
    names = {field.name for method in METHODS.values() for field in method.input_type.fields}
    assert {name for name in names if name.endswith(("_id", "_ids")) and not is_id(name)} <= NOT_IDS
    assert is_id("app_name"), "an App is found by its id there, too"


def test_ids_are_found_however_deep_they_are():
    request = api_pb2.FunctionCreateRequest(
        app_id="ap-1",
        function=api_pb2.Function(
            secret_ids=["st-1"],
            volume_mounts=[api_pb2.VolumeMount(volume_id="vo-1")],
            object_dependencies=[api_pb2.ObjectDependency(object_id="di-1")],
        ),
    )
    assert set(ids_in(request)) == {"ap-1", "st-1", "vo-1", "di-1"}
    published = api_pb2.AppPublishRequest(app_id="ap-1", function_ids={"f": "fu-1"})
    assert set(ids_in(published)) == {"ap-1", "fu-1"}


@pytest.mark.parametrize("name", sorted(RULES))
def test_a_container_that_is_shut_off_may_use_only_what_is_for_its_own_work(name):
    shut_off = Caller(workspace="local", task_id="ta-1", is_restricted=True)
    if RULES[name].for_restricted:
        check_kind(name, RULES[name], shut_off)
        return
    with pytest.raises(PermissionDenied, match="restrict_modal_access"):
        check_kind(name, RULES[name], shut_off)


def test_only_containers_do_the_work_of_containers_and_only_people_manage():
    for name, rule in RULES.items():
        if rule.right is Right.CONTAINER:
            with pytest.raises(PermissionDenied):
                check_kind(name, rule, Caller(workspace="local", token_id="ak-1"))
        if rule.right in (Right.MANAGE, Right.WORKSPACE):
            with pytest.raises(PermissionDenied):
                check_kind(name, rule, CONTAINER)


def test_looking_for_ids_ends_in_messages_that_contain_themselves():
    def walk(descriptor: Descriptor, seen: set[str]) -> None:
        if descriptor.full_name not in seen:
            seen.add(descriptor.full_name)
            list(ids_in(GetMessageClass(descriptor)()))
            for field in descriptor.fields:
                if field.message_type is not None:
                    walk(field.message_type, seen)

    for method in METHODS.values():
        walk(method.input_type, set())
