"""`aeolian connect`: lets the official client use this Aeolian, by a profile or by environment variables."""

import os
import shlex
from pathlib import Path
from typing import NamedTuple

import click
import tomlkit
from tomlkit.exceptions import TOMLKitError

from aeolian.cli import client_token
from aeolian.cli.settings import load_of
from aeolian.domain.errors import FailedPrecondition, InvalidArgument

OVERRIDING = ("MODAL_SERVER_URL", "MODAL_TOKEN_ID", "MODAL_TOKEN_SECRET", "MODAL_PROFILE")


class Profile(NamedTuple):
    """One section of the client's configuration file."""

    name: str
    server_url: str
    token_id: str
    token_secret: str


def config_path() -> Path:
    """Where the client looks: MODAL_CONFIG_PATH, else `~/.modal.toml`."""
    return Path(os.environ.get("MODAL_CONFIG_PATH") or "~/.modal.toml").expanduser()


def write_profile(path: Path, profile: Profile, *, activate: bool) -> str | None:
    """Add or replace one profile; the others, their order and comments stay. Returns which was active before.

    As the client does it: `activate` takes `active` from every other profile, and the first profile of a file is
    always made active. Raises InvalidArgument when the file is not such a configuration, FailedPrecondition when the
    name belongs to another service.
    """
    path = Path(os.path.realpath(path))
    try:
        document = tomlkit.parse(path.read_text())
    except FileNotFoundError:
        document = tomlkit.document()
    except (OSError, UnicodeDecodeError, TOMLKitError) as error:
        raise InvalidArgument(
            f"{path} cannot be read: {error}. Mend it, or name another by MODAL_CONFIG_PATH"
        ) from error
    for name, section in document.items():
        if not isinstance(section, dict):
            raise InvalidArgument(f"{path} is not a configuration of the modal client: {name!r} is not a section")
    active = next((name for name, section in document.items() if section.get("active") is True), None)
    section = document.get(profile.name)
    if section is not None and "token_id" in section and "server_url" not in section:
        raise FailedPrecondition(
            f"the profile {profile.name!r} in {path} holds a token of modal.com; choose another name with --profile"
        )
    if section is None:
        section = document[profile.name] = tomlkit.table()
    section.update({"token_id": profile.token_id, "token_secret": profile.token_secret})
    section["server_url"] = profile.server_url
    if activate or len(document) == 1:
        for other in document.values():
            other.pop("active", None)
        section["active"] = True
    _replace(path, tomlkit.dumps(document))
    return active


def _replace(path: Path, text: str) -> None:
    """Whole or not at all, and for its owner alone: it holds secrets."""
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as stream:
            stream.write(text)
        fresh.replace(path)
    except OSError as error:
        fresh.unlink(missing_ok=True)
        raise InvalidArgument(f"{path} cannot be written: {error.strerror or error}") from error


@click.command()
@click.option("--print-env", is_flag=True, help="Print export lines for a shell instead of writing a profile.")
@click.option("--profile", "name", default="aeolian", show_default=True, help="Name of the profile to write.")
@click.option("--activate/--no-activate", default=True, show_default=True, help="Make it the client's active profile.")
@click.pass_obj
def connect(data_dir: Path, print_env: bool, name: str, activate: bool) -> None:
    """Let the modal client use this Aeolian."""
    settings = load_of(data_dir)
    token = client_token.load(settings)
    profile = Profile(name, settings.grpc_url, token.token_id, token.token_secret)
    if print_env:
        click.echo(f"export MODAL_SERVER_URL={shlex.quote(profile.server_url)}")
        click.echo(f"export MODAL_TOKEN_ID={shlex.quote(profile.token_id)}")
        click.echo(f"export MODAL_TOKEN_SECRET={shlex.quote(profile.token_secret)}")
        return
    path = config_path()
    before = write_profile(path, profile, activate=activate)
    if activate:
        click.echo(f"{path}: the profile {name!r} is written and active: `modal run …` uses {settings.grpc_url} now.")
        if before not in (None, name):
            click.echo(f"Back to the one before: modal profile activate {shlex.quote(before)}")
    else:
        click.echo(f"{path}: the profile {name!r} is written. Use it: MODAL_PROFILE={shlex.quote(name)} modal run …")
    overriding = [variable for variable in OVERRIDING if os.environ.get(variable)]
    if overriding:
        click.echo(f"Note: {', '.join(overriding)} in the environment comes before any profile: unset it.", err=True)
