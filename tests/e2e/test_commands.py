"""`aeolian connect`, `token` and `status`, beside a running server and seen by the official client."""

import json
import shlex
import sys
import time

import pytest
from running import AEOLIAN

REFUSED_WITHIN_S = 10.0


def command(aeolian, *argv: str, **kwargs) -> str:
    return aeolian.run(*AEOLIAN, *argv, "--data-dir", str(aeolian.data_dir), **kwargs)


def exported(printed: str) -> dict[str, str]:
    lines = [line.removeprefix("export ") for line in printed.splitlines() if line.startswith("export ")]
    return dict(shlex.split(line)[0].split("=", 1) for line in lines)


@pytest.fixture
def token(aeolian):
    """Variables of a token of this test's own."""
    variables = exported(command(aeolian, "token", "create", "of-a-test"))
    yield variables
    command(aeolian, "token", "delete", variables["MODAL_TOKEN_ID"])


def is_accepted(aeolian, token: dict[str, str]) -> bool:
    program = "import modal; modal.Dict.objects.list()"
    try:
        aeolian.run(sys.executable, "-c", program, env=token)
        return True
    except AssertionError as error:
        assert "AuthError" in str(error)
        return False


def refused_soon(aeolian, token: dict[str, str]) -> bool:
    until = time.monotonic() + REFUSED_WITHIN_S
    while time.monotonic() < until:
        if not is_accepted(aeolian, token):
            return True
    return False


def test_the_profile_that_connect_writes_is_one_for_the_client(aeolian, tmp_path):
    config = {"MODAL_CONFIG_PATH": str(tmp_path / "modal.toml"), "MODAL_TOKEN_ID": "", "MODAL_TOKEN_SECRET": ""}
    command(aeolian, "connect", "--profile", "mine", env=config)
    assert aeolian.modal("profile", "current", env={**config, "MODAL_SERVER_URL": ""}).strip() == "mine"
    assert "local" in aeolian.modal("profile", "list", env={**config, "MODAL_SERVER_URL": ""})


def test_the_client_is_told_whose_token_it_uses(aeolian):
    shown = aeolian.modal("token", "info")
    assert aeolian.environment["MODAL_TOKEN_ID"] in shown and "local" in shown


def test_a_new_token_works_at_once_and_a_disabled_one_stops_within_seconds(aeolian, token):
    assert is_accepted(aeolian, token)
    command(aeolian, "token", "disable", token["MODAL_TOKEN_ID"])
    assert refused_soon(aeolian, token)
    command(aeolian, "token", "enable", token["MODAL_TOKEN_ID"])
    assert is_accepted(aeolian, token)


def test_a_deleted_token_stops_within_seconds_and_is_listed_no_more(aeolian):
    token = exported(command(aeolian, "token", "create", "short-lived"))
    assert is_accepted(aeolian, token)
    assert token["MODAL_TOKEN_ID"] in command(aeolian, "token", "list")
    command(aeolian, "token", "delete", token["MODAL_TOKEN_ID"])
    assert refused_soon(aeolian, token)
    assert token["MODAL_TOKEN_ID"] not in command(aeolian, "token", "list")


def test_a_token_that_is_not_there_is_said(aeolian):
    assert "there is no token 'ak-0'" in command(aeolian, "token", "delete", "ak-0", ok=False)


def test_status_shows_what_runs_and_what_starts_cost(aeolian, tmp_path):
    aeolian.run_app(
        """
        import modal

        app = modal.App("looked-at")

        @app.function()
        def nothing(): ...

        @app.local_entrypoint()
        def main():
            nothing.remote()
        """,
        tmp_path,
    )
    found = json.loads(command(aeolian, "status", "--json"))
    assert {process["name"] for process in found["processes"]} >= {"front", "server", "worker"}
    assert found["grpc_url"] == aeolian.environment["MODAL_SERVER_URL"]
    start = next(start for start in found["starts"] if start["app_name"] == "looked-at")
    assert start["function_name"] == "nothing"
    steps = {hook["name"]: hook["seconds"] for hook in start["hooks"]}
    assert {"socket", "image", "sdk", "volumes", "process", "user code"} <= steps.keys()
    assert 0 < sum(steps.values()) <= start["started_at"] - start["enqueued_at"]
    shown = command(aeolian, "status")
    assert start["task_id"] in shown and "looked-at.nothing" in shown
