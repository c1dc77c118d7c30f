import pytest
from modal_proto import api_pb2

from aeolian.control.unbuilt import unbuilt


def function(**fields) -> api_pb2.Function:
    return api_pb2.Function(function_name="f", **fields)


WEB = api_pb2.WebhookConfig(type=api_pb2.WEBHOOK_TYPE_FUNCTION)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (function(is_server=True, http_config=api_pb2.HTTPConfig(h2_enabled=True)), "not reached by HTTP/2 yet"),
        (function(is_server=True, is_sessioned=True), "sessions are not kept yet"),
        (
            function(webhook_config=api_pb2.WebhookConfig(custom_domains=[api_pb2.CustomDomainConfig(name="a.b")])),
            "domains of one's own",
        ),
        (
            function(
                class_parameter_info=api_pb2.ClassParameterInfo(schema=[api_pb2.ClassParameterSpec(name="size")]),
                method_definitions={"page": api_pb2.MethodDefinition(webhook_config=WEB)},
            ),
            "a URL cannot hold parameters",
        ),
    ],
)
def test_what_is_asked_for_in_vain_is_said_with_the_function_s_name(asked, said):
    (sentence,) = unbuilt(asked)
    assert said in sentence and "'f'" in sentence


def test_an_ordinary_function_asks_for_nothing_in_vain():
    assert unbuilt(function(timeout_secs=10, webhook_config=WEB)) == []
    assert unbuilt(function(method_definitions={"page": api_pb2.MethodDefinition(webhook_config=WEB)})) == []
