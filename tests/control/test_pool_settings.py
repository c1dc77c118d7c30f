import pytest
from modal_proto import api_pb2

from aeolian.control.pool_settings import pool_settings


@pytest.mark.parametrize(
    ("timeout", "startup_timeout", "seconds"),
    [
        pytest.param(0, 0, 300, id="nothing is said"),
        pytest.param(2, 0, 60, id="a start takes longer than the shortest inputs"),
        pytest.param(2, 2, 60, id="the SDK repeats the inputs' timeout"),
        pytest.param(900, 900, 900, id="as long as inputs"),
        pytest.param(900, 5, 5, id="asked for"),
        pytest.param(5, 900, 900, id="asked for more"),
    ],
)
def test_how_long_a_start_may_take(timeout, startup_timeout, seconds):
    function = api_pb2.Function(timeout_secs=timeout, startup_timeout_secs=startup_timeout)
    settings = pool_settings(
        function,
        function_id="fu-1",
        definition_id="de-1",
        revision="1",
        app_id="ap-1",
        environment_name="main",
        sdk_version="1.6.4",
    )
    assert settings.startup_timeout_s == seconds
