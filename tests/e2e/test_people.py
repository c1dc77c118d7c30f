"""Several people on one Aeolian: roles, service users, quotas, the audit trail, and containers that are shut off."""

import json
import os
import re
import subprocess
import sys
import urllib.error
import urllib.parse
import urllib.request

from running import AEOLIAN

APP = '''
import time

import modal

app = modal.App("shared")


@app.function()
def reaches():
    """What a container of `dev` gets from its own environment and from `main`."""
    modal.Dict.from_name("notes", create_if_missing=True)["key"] = "value"
    try:
        modal.Dict.from_name("notes", environment_name="main", create_if_missing=True).len()
    except modal.exception.PermissionDeniedError as error:
        return str(error)


@app.function(restrict_modal_access=True)
def shut_off(number):
    try:
        modal.Dict.from_name("notes", create_if_missing=True).len()
    except modal.exception.PermissionDeniedError as error:
        return number + 1, str(error)


@app.function(restrict_modal_access=True)
def yields():
    yield from range(3)


@app.function()
def slow(number):
    time.sleep(2)
    return number


@app.function()
def slow_too(number):
    time.sleep(2)
    return number


@app.local_entrypoint()
def main():
    calls = [slow.spawn(1), slow_too.spawn(2)]
    assert "stay inside" in reaches.remote()
    assert modal.FunctionCall.gather(*calls) == [1, 2]
    number, refused = shut_off.remote(1)
    assert number == 2 and "restrict_modal_access" in refused, refused
    assert len(shut_off.remote(10)) == 2
    assert list(yields.remote_gen()) == [0, 1, 2]
    print("all is well")
'''


def command(aeolian, *args: str, ok: bool = True) -> str:
    """`aeolian …` on the server's machine."""
    done = subprocess.run(
        [*AEOLIAN, *args, "--data-dir", str(aeolian.data_dir)],
        env={**os.environ, "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode == 0) == ok, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_a_service_user_does_what_its_role_allows_and_its_containers_stay_inside(aeolian, tmp_path):
    (tmp_path / "shared.py").write_text(APP)
    *_, made, _, roles, user, members = aeolian.modal_session(
        ("environment create dev", "Environment created: dev"),
        ("workspace service-users create bot --expires-in 30d --json", "token_secret"),
        ("workspace service-users set-role bot dev contributor", ""),
        ("environment roles list dev --json", "bot"),
        ("workspace service-users info bot --json", "contributor"),
        ("workspace members list --json", "owner"),
    )
    token = json.loads(made)
    assert json.loads(roles)["service_users"] == {"bot": "contributor"}
    assert json.loads(user)["environment_roles"] == {"dev": "contributor"}
    assert json.loads(members)[0]["name"] == "first"
    bot = {
        "MODAL_TOKEN_ID": token["token_id"],
        "MODAL_TOKEN_SECRET": token["token_secret"],
        "MODAL_ENVIRONMENT": "dev",
    }
    command(aeolian, "quota", "set", "dev", "--containers", "2")
    assert re.search(r"dev +2 +any +any +any +itself only", command(aeolian, "quota", "list"))

    printed = aeolian.modal("run", "shared.py", cwd=tmp_path, env=bot)
    assert "all is well" in printed
    assert "waits for a container: environment 'dev' uses its quota of 2 containers already" in printed
    aeolian.modal_session(
        ("! app list -e main", "your token 'bot' has no role there"),
        ("! dict create -e main notes", "your token 'bot' has no role there"),
        ("token info", "Service User"),
        env=bot,
    )
    aeolian.modal_session(
        ("environment roles update dev bot --service-user --role viewer", "to role 'viewer'"),
        ("dict get notes key -e dev", "value"),
    )
    aeolian.modal_session(
        ("dict get notes key", "value"),
        ("! dict clear --yes notes", "only a viewer"),
        env=bot,
    )
    entries = [json.loads(line) for line in command(aeolian, "audit", "--json", "--token", "bot").splitlines()]
    assert ("AppCreate", "dev", "done") in {(one["action"], one["environment"], one["result"]) for one in entries}
    assert (entries[-1]["action"], entries[-1]["result"]) == ("DictClear", "refused")
    aeolian.modal_session(
        ("workspace service-users delete bot --yes", "Deleted"),
        ("environment delete dev --yes", ""),
    )
    assert "not one of this server" in aeolian.modal("app", "list", env=bot, ok=False)


def test_tokens_are_made_with_roles_and_an_end_and_taken_away_again(aeolian, tmp_path):
    exports = command(aeolian, "token", "create", "ann", "--expires", "1d", "--role", "main=viewer")
    pairs = dict(re.findall(r"^export (\w+)=(\S+)$", exports, re.MULTILINE))
    ann = {name: value for name, value in pairs.items() if name != "MODAL_SERVER_URL"}
    assert ann["MODAL_ENVIRONMENT"] == "main"
    assert re.search(r"ann +main=viewer +valid", command(aeolian, "token", "list"))
    assert "no role" in command(aeolian, "token", "create", "x", "--role", "main=king", ok=False)
    aeolian.modal_session(("app list", ""), ("! workspace service-users list", "manages the whole workspace"), env=ann)
    aeolian.modal_session(
        (f"workspace member-tokens disable {ann['MODAL_TOKEN_ID']} --yes", ""),
        ("workspace member-tokens list --json", '"ann"'),
    )
    assert "is disabled" in aeolian.modal("app", "list", env=ann, ok=False)
    aeolian.modal_session(
        (f"workspace member-tokens enable {ann['MODAL_TOKEN_ID']} --yes", ""),
        (f"workspace member-tokens delete {ann['MODAL_TOKEN_ID']} --yes", ""),
    )
    assert "ann" not in command(aeolian, "token", "list")


def test_a_terminal_gets_a_token_that_somebody_with_a_token_approves(aeolian, tmp_path):
    environment = aeolian.environment
    config = f"MODAL_CONFIG_PATH={tmp_path / 'modal.toml'}"
    argv = (
        "env",
        "-u",
        "MODAL_TOKEN_ID",
        "-u",
        "MODAL_TOKEN_SECRET",
        "BROWSER=false",
        config,
        sys.executable,
        "-um",
        "modal",
    )
    terminal = aeolian.start_command(*argv, "token", "new", "--expires-in", "1d")
    printed = ""
    assert terminal.stdout is not None
    while not (code := re.search(r"Enter this code: (\w+)", printed)):
        line = terminal.stdout.readline()
        assert line, printed
        printed += line
    url = re.search(r"http://\S+/token-flow/\S+", printed).group()

    def approve(**fields: str) -> int:
        try:
            with urllib.request.urlopen(url, urllib.parse.urlencode(fields).encode(), timeout=10) as answer:
                return answer.status
        except urllib.error.HTTPError as error:
            return error.code

    with urllib.request.urlopen(url, timeout=10) as page:
        assert "asks for a token" in page.read().decode()
    mine = {"token_id": environment["MODAL_TOKEN_ID"], "token_secret": environment["MODAL_TOKEN_SECRET"]}
    assert approve(code="WRONG", **mine) == 403
    assert approve(code=code.group(1), token_id="ak-1", token_secret="as-1") == 403
    assert approve(code=code.group(1).lower(), **mine) == 200
    assert approve(code=code.group(1), **mine) != 200
    rest, _ = terminal.communicate(timeout=60)
    assert terminal.returncode == 0 and "Token verified successfully" in rest, rest
    assert "ak-" in (tmp_path / "modal.toml").read_text()
    assert "token flow" in command(aeolian, "audit")
