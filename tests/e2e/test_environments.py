"""Environments, tokens and profiles, driven by the official client."""

import json
import re
import sys
import urllib.request

PLACED = '''
import os

import modal

app = modal.App("placed")


@app.function()
def where():
    """Look-ups in a container go to its own environment."""
    dict_ = modal.Dict.from_name("notes", create_if_missing=True)
    return os.environ["MODAL_ENVIRONMENT"], dict_.get("written_in"), modal.Function.from_name("placed", "name").remote()


@app.function()
def name():
    return os.environ["MODAL_ENVIRONMENT"]


@app.function(min_containers=1)
def warm():
    pass
'''

ASKS = """
import modal

for environment in ("main", "staging"):
    notes = modal.Dict.from_name("notes", environment_name=environment, create_if_missing=True)
    notes["written_in"] = environment
    where = modal.Function.from_name("placed", "where", environment_name=environment)
    assert where.remote() == (environment, environment, environment), where.remote()
print("all is well")
"""


def test_each_environment_has_names_of_its_own_and_goes_with_all_that_is_in_it(aeolian, tmp_path):
    (tmp_path / "placed.py").write_text(PLACED)
    listed, *_ = aeolian.modal_session(
        ("environment list --json", ""),
        ("environment create staging", "Environment created: staging"),
        ("! environment create staging", "already exists"),
        ("! app list -e stagin", "did you mean 'staging'?"),
    )
    aeolian.modal("deploy", "placed.py", cwd=tmp_path)
    deployed = aeolian.modal("deploy", "placed.py", "-e", "staging", cwd=tmp_path)
    assert [(entry["name"], entry["active"]) for entry in json.loads(listed)] == [("main", "True")]
    page_url = re.search(r"http://\S+/apps/ap-\w+", deployed).group()
    with urllib.request.urlopen(page_url) as page:
        assert "staging" in page.read().decode()
    assert "all is well" in aeolian.python(ASKS, tmp_path)

    _, apps, dicts = aeolian.modal_session(
        ("environment update staging --set-name prod --set-web-suffix live", "Environment updated"),
        ("app list -e prod --json", "placed"),
        ("dict list -e prod --json", "notes"),
    )
    assert [entry["state"] for entry in json.loads(apps)] == ["deployed"] and len(json.loads(dicts)) == 1
    assert aeolian.python(
        "import modal; print(modal.Function.from_name('placed', 'where', environment_name='prod').remote())", tmp_path
    )
    aeolian.modal_session(
        ("! environment delete --yes main", "default environment"),
        ("environment delete --yes prod", "Environment deleted: prod"),
        ("! app list -e prod", "there is no environment 'prod'"),
        ("environment create prod", ""),
        ("! dict get notes written_in -e prod", "notes"),
        ("environment delete --yes prod", ""),
        ("app stop --yes placed -e main", ""),
    )
    containers = [entry for entry in aeolian.modal_json("container", "list") if entry["app_name"] == "placed"]
    assert containers == []


def test_a_token_is_verified_and_kept_in_a_profile(aeolian, tmp_path):
    environment = aeolian.environment
    token_id, secret = environment["MODAL_TOKEN_ID"], environment["MODAL_TOKEN_SECRET"]
    config = f"MODAL_CONFIG_PATH={tmp_path / 'modal.toml'}"
    without_token = ("env", "-u", "MODAL_TOKEN_ID", "-u", "MODAL_TOKEN_SECRET", config, sys.executable, "-m", "modal")

    def modal(*args, ok=True):
        return aeolian.run(*without_token, *args, ok=ok)

    assert "verified" in modal("token", "set", "--token-id", token_id, "--token-secret", secret, "--profile", "mine")
    assert "not one of this server" in modal(
        "token", "set", "--token-id", token_id, "--token-secret", "as-wrong", "--profile", "bad", ok=False
    )
    assert "bad" not in (tmp_path / "modal.toml").read_text()
    modal("profile", "activate", "mine")
    assert "mine" in modal("profile", "list") and modal("profile", "current").strip() == "mine"
    assert token_id in modal("token", "info")
    assert '"token_secret": "***"' in modal("config", "show")
