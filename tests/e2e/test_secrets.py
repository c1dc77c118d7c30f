"""Secrets, driven by the official client."""

import json
import uuid

import pytest

APP = """
    import hashlib, os
    import modal

    app = modal.App("secrets-{unique}")
    NAMES = ["DICT", "DOT", "LOCAL_ONE", "NAMED", "SHARED", "EXTRA", "SKIPPED"]
    named = modal.Secret.from_name("named-{unique}", required_keys=["NAMED", "SHARED"])
    secrets = [
        modal.Secret.from_dict({{"DICT": 'two\\nlines "quoted" ü=', "SHARED": "dict", "SKIPPED": None}}),
        modal.Secret.from_dotenv(__file__),
        modal.Secret.from_local_environ(["LOCAL_ONE"]),
        named,
    ]

    def digest(value):
        return value and hashlib.sha256(value.encode()).hexdigest()

    def seen():
        return {{name: digest(os.environ.get(name)) for name in NAMES}}

    @app.function(secrets=secrets, env={{"EXTRA": "extra"}})
    def forwards():
        return seen()

    @app.function(secrets=secrets[::-1])
    def backwards():
        return seen()

    @app.function(secrets=[named], max_containers=1)
    def first():
        return seen()["NAMED"]

    @app.function(secrets=[named])
    def later():
        return seen()["NAMED"]
"""


@pytest.fixture
def unique() -> str:
    return uuid.uuid4().hex[:8]


def test_variables_reach_containers_later_secrets_win_and_an_update_reaches_new_ones(aeolian, tmp_path, unique):
    (tmp_path / ".env").write_text(f'# settings\nDOT="dotenv {unique}"\nSHARED=dotenv\n')
    program = (
        APP.format(unique=unique)
        + f"""
    if __name__ == "__main__":
        modal.Secret.objects.create("named-{unique}", {{"NAMED": "before {unique}", "SHARED": "named"}})
        with app.run():
            there = forwards.remote()
            assert there == {{
                "DICT": digest('two\\nlines "quoted" ü='),
                "DOT": digest("dotenv {unique}"),
                "LOCAL_ONE": digest("local {unique}"),
                "NAMED": digest("before {unique}"),
                "SHARED": digest("named"),
                "EXTRA": digest("extra"),
                "SKIPPED": None,
            }}, there
            back = backwards.remote()
            assert (back["SHARED"], back["EXTRA"]) == (digest("dict"), None), back
            assert first.remote() == digest("before {unique}")
            named.update({{"NAMED": "after {unique}"}})
            assert first.remote() == digest("before {unique}")
            assert later.remote() == digest("after {unique}")
            of_the_app = secrets[0].object_id
        with app.run():
            assert first.remote() == digest("after {unique}")
        try:
            modal.Secret._from_id(of_the_app).hydrate()
            raise AssertionError("what the App owned has outlived it")
        except modal.exception.NotFoundError:
            pass
        modal.Secret.objects.delete("named-{unique}")
        try:
            with app.run():
                raise AssertionError("a Secret that is gone was found")
        except modal.exception.NotFoundError as error:
            assert "may have been deleted" in str(error), error
        print("all is well")
    """
    )
    output = aeolian.python(program, tmp_path, env={"LOCAL_ONE": f"local {unique}"})
    assert "all is well" in output
    for text in (f"dotenv {unique}", f"local {unique}", f"before {unique}", f"after {unique}"):
        assert files_with(aeolian.data_dir, text) == []


def files_with(folder, text: str) -> list[str]:
    """Files of the data directory that hold this text; the uploaded program may, it is the user's own."""
    uploaded = (folder / "content", folder / "mounts")
    files = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    return [
        str(path)
        for path in files
        if not any(path.is_relative_to(place) for place in uploaded) and text.encode() in path.read_bytes()
    ]


def test_secrets_are_made_listed_looked_at_and_deleted(aeolian, tmp_path, unique):
    output = aeolian.python(
        f"""
        import modal
        from modal.exception import AlreadyExistsError, ConflictError, InvalidError, NotFoundError

        secrets = modal.Secret.objects
        for number in range(3):
            secrets.create(f"s{{number}}-{unique}", {{"A": "1", "B": "2"}})
        mine = [secret.name for secret in secrets.list() if secret.name.endswith("{unique}")]
        assert mine == ["s2-{unique}", "s1-{unique}", "s0-{unique}"], mine
        assert [secret.name for secret in secrets.list(max_objects=1)] == ["s2-{unique}"]
        info = modal.Secret.from_name("s1-{unique}").info()
        assert (info.name, info.environment_name, info.last_used) == ("s1-{unique}", "main", None), info

        def fails(kind, text, act):
            try:
                act()
            except kind as error:
                assert text in str(error), error
            else:
                raise AssertionError(f"nothing was raised, {{text}} was expected")

        fails(AlreadyExistsError, "s1-{unique}", lambda: secrets.create("s1-{unique}", {{"A": "3"}}))
        secrets.create("s1-{unique}", {{"A": "3"}}, allow_existing=True)
        fails(InvalidError, "Invalid Secret name", lambda: secrets.create("has space", {{"A": "3"}}))
        fails(InvalidError, "'1A' cannot be an environment variable", lambda: secrets.create("x", {{"1A": "3"}}))
        fails(NotFoundError, "'nope-{unique}' not found", lambda: modal.Secret.from_name("nope-{unique}").hydrate())
        fails(
            ConflictError,
            "missing key(s): C, D",
            lambda: modal.Secret.from_name("s1-{unique}", required_keys=["A", "D", "C"]).hydrate(),
        )
        modal.Secret.from_name("s1-{unique}", required_keys=["A", "B"]).hydrate()
        secrets.delete("s1-{unique}")
        fails(NotFoundError, "s1-{unique}", lambda: secrets.delete("s1-{unique}"))
        secrets.delete("s1-{unique}", allow_missing=True)
        assert modal.Secret.from_dict({{"A": "1"}}).hydrate().object_id.startswith("st-")

        modal.environments.create_environment("other-{unique}")
        secrets.create("s0-{unique}", {{"C": "3"}}, environment_name="other-{unique}")
        other = modal.Secret.from_name("s0-{unique}", environment_name="other-{unique}", required_keys=["C"]).hydrate()
        assert other.object_id != modal.Secret.from_name("s0-{unique}").hydrate().object_id
        modal.environments.delete_environment("other-{unique}")
        fails(NotFoundError, "no Secret with the id", lambda: other.info(refresh=True))
        print("all is well")
        """,
        tmp_path,
    )
    assert "all is well" in output


def test_secrets_by_the_cli(aeolian, tmp_path, unique):
    (tmp_path / "vars.env").write_text("FROM_FILE=1\n")
    (tmp_path / "vars.json").write_text('{"FROM_JSON": "2"}')
    name = f"cli-{unique}"
    made, *_, listed = aeolian.modal_session(
        (f"secret create {name} 'A=first value' --from-dotenv vars.env --from-json vars.json", "FROM_JSON"),
        (f"! secret create {name} A=2", "already exists"),
        (f"secret create {name} ONLY=this --force", "Created a new secret"),
        ("! secret create has/slash A=2", "Invalid Secret name"),
        ("! secret create x 1A=2", "'1A' cannot be an environment variable"),
        ("secret list --json", name),
        cwd=tmp_path,
    )
    assert "first value" not in made
    [row] = [row for row in json.loads(listed) if row["name"] == name]
    assert row["last_used_at"] == "-"
    aeolian.modal_session(
        (f"secret delete {name} --yes", ""),
        (f"! secret delete {name} --yes", f"'{name}' not found in environment 'main'"),
        (f"secret delete {name} --yes --allow-missing", ""),
    )
