"""`aeolian token`: who may use this Aeolian, and what for. Works on the database, whether or not the server runs; a
running server goes by what is said here within seconds."""

import datetime
import shlex
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import click
from rich.table import Table

from aeolian.cli import client_token, tables
from aeolian.cli.durations import DAY_S, duration_s
from aeolian.cli.people import People, with_people
from aeolian.cli.settings import Settings, load_of
from aeolian.control.tokens import RECHECK_S, Tokens
from aeolian.domain.clock import SystemClock
from aeolian.domain.errors import FailedPrecondition
from aeolian.domain.roles import Role, role_named
from aeolian.storage.environments import Environment
from aeolian.storage.tokens import Token


@click.group()
def token() -> None:
    """List, make, limit, disable and delete tokens of clients."""


@token.command("list")
@click.pass_obj
def list_tokens(data_dir: Path) -> None:
    """List the tokens; secrets are not kept, so none is shown."""
    settings = load_of(data_dir)

    async def read(people: People) -> tuple[list[Token], list[Environment]]:
        return await people.tokens.all(), people.environments.all()

    tokens, environments = with_people(settings, read)
    names = {environment.id: environment.name for environment in environments}
    tables.console().print(table(tokens, connected_id(settings), SystemClock().now(), names))


@token.command()
@click.argument("name")
@click.option("--expires", metavar="30d", help="A time in s, m, h, d or w. Default: it does not expire.")
@click.option("--expires-in-days", type=click.FloatRange(0, min_open=True), hidden=True)
@click.option(
    "--role",
    "roles",
    multiple=True,
    metavar="ENV=ROLE",
    help="viewer, contributor or manager of an environment, and nothing else. Default: it manages everything.",
)
@click.pass_obj
def create(data_dir: Path, name: str, expires: str | None, expires_in_days: float | None, roles: Sequence[str]) -> None:
    """Make a token called NAME and print its secret, this once."""
    settings = load_of(data_dir)
    lifetime_s = duration_s(expires) if expires else (expires_in_days or 0.0) * DAY_S
    expires_at = SystemClock().now() + lifetime_s if lifetime_s else 0.0

    async def make(people: People) -> tuple[str, str]:
        given = people.roles(roles) if roles else None
        made = await people.tokens.create(name, settings.workspace, expires_at=expires_at, roles=given)
        await people.trail.record_local("token create", "", [name, made[0], *roles])
        return made

    token_id, secret = with_people(settings, make)
    click.echo(f"export MODAL_SERVER_URL={shlex.quote(settings.grpc_url)}")
    click.echo(f"export MODAL_TOKEN_ID={token_id}")
    click.echo(f"export MODAL_TOKEN_SECRET={secret}")
    if len(roles) == 1:
        click.echo(f"export MODAL_ENVIRONMENT={shlex.quote(roles[0].partition('=')[0])}")
    click.echo("The secret is not kept: this is the only time that it is shown.", err=True)
    _tell_of_restriction(roles)


@token.command()
@click.argument("token_id")
@click.argument("roles", nargs=-1, required=True, metavar="ENV=ROLE...")
@click.pass_obj
def role(data_dir: Path, token_id: str, roles: Sequence[str]) -> None:
    """Give a token roles in environments: viewer, contributor, manager or no-access. It must have been limited."""
    settings = load_of(data_dir)

    async def give(people: People) -> None:
        for environment_id, given in people.roles(roles).items():
            await people.tokens.set_role(token_id, environment_id, given)
        await people.trail.record_local("token role", "", [token_id, *roles])

    with_people(settings, give)
    click.echo(f"{token_id} is now {', '.join(roles)}; a running server goes by it within {RECHECK_S:g} s.")
    _tell_of_restriction(roles)


@token.command()
@click.argument("token_id")
@click.pass_obj
def limit(data_dir: Path, token_id: str) -> None:
    """Let a token that manages everything have only the roles that it is given."""
    settings = load_of(data_dir)
    _change(settings, "token limit", token_id, lambda tokens: tokens.limit(token_id))
    click.echo(f"{token_id} has no role yet: give it some with `aeolian token role {token_id} main=viewer`.")


@token.command()
@click.argument("token_id")
@click.pass_obj
def disable(data_dir: Path, token_id: str) -> None:
    """Refuse a token until it is enabled again."""
    settings = load_of(data_dir)
    _change(settings, "token disable", token_id, lambda tokens: tokens.set_disabled(token_id, True))
    click.echo(f"{token_id} is disabled; a running server refuses it within {RECHECK_S:g} s.")


@token.command()
@click.argument("token_id")
@click.pass_obj
def enable(data_dir: Path, token_id: str) -> None:
    """Accept a disabled token again."""
    _change(load_of(data_dir), "token enable", token_id, lambda tokens: tokens.set_disabled(token_id, False))
    click.echo(f"{token_id} is enabled.")


@token.command()
@click.argument("token_id")
@click.pass_obj
def delete(data_dir: Path, token_id: str) -> None:
    """Delete a token for good."""
    settings = load_of(data_dir)
    _change(settings, "token delete", token_id, lambda tokens: tokens.delete(token_id))
    click.echo(f"{token_id} is deleted; a running server refuses it within {RECHECK_S:g} s.")
    if token_id == connected_id(settings):
        click.echo(
            "It was the one that `aeolian connect` hands out: the next start of `aeolian up` makes another.", err=True
        )


def table(tokens: list[Token], connected_id: str, now: float, environments: dict[str, str]) -> Table:
    """`connected_id`: the one that `aeolian connect` hands out. `environments`: names by id."""
    rows = tables.table("token", "name", "may", "state", "made", "last used", "expires", whole=("token",))
    for item in tokens:
        name = f"{item.name} (aeolian connect)" if item.token_id == connected_id else item.name
        expires = _date(item.expires_at) if item.expires_at else "never"
        used = _date(item.last_used_at) if item.last_used_at else "never"
        if item.service_user_id:
            name += " (service user)"
        rows.add_row(
            item.token_id, name, _may(item, environments), _state(item, now), _date(item.created_at), used, expires
        )
    return rows


def connected_id(settings: Settings) -> str:
    """The id of the token that `aeolian connect` hands out, "" when there is none."""
    try:
        return client_token.load(settings).token_id
    except FailedPrecondition:
        return ""


def _state(item: Token, now: float) -> str:
    if item.is_disabled:
        return "disabled"
    return "expired" if item.expires_at and now >= item.expires_at else "valid"


def _date(at: float) -> str:
    return datetime.datetime.fromtimestamp(at).strftime("%Y-%m-%d %H:%M")


def _may(item: Token, environments: dict[str, str]) -> str:
    if not item.is_limited:
        return "everything"
    roles = [(environments.get(environment_id, ""), role) for environment_id, role in item.roles.items()]
    return " ".join(f"{name}={role.label}" for name, role in sorted(roles) if name) or "nothing"


def _change(settings: Settings, action: str, token_id: str, do: Callable[[Tokens], Awaitable[None]]) -> None:
    async def change(people: People) -> None:
        await do(people.tokens)
        await people.trail.record_local(action, "", [token_id])

    with_people(settings, change)


def _tell_of_restriction(roles: Sequence[str]) -> None:
    names = [name for name, _, role in (text.rpartition("=") for text in roles) if role_named(role) >= Role.CONTRIBUTOR]
    if names:
        click.echo(
            f"Who may deploy into an environment runs code there: containers of {', '.join(names)} now reach no other "
            "environment.",
            err=True,
        )
