"""`aeolian token`: who may use this Aeolian. Works on the database, whether or not the server runs; a running server
goes by what is said here within seconds."""

import asyncio
import datetime
import shlex
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

import click
from rich.table import Table

from aeolian.cli import client_token, tables
from aeolian.cli.open_database import open_database
from aeolian.cli.settings import Settings, load_of
from aeolian.control.tokens import RECHECK_S, Tokens
from aeolian.domain.clock import SystemClock
from aeolian.domain.errors import FailedPrecondition
from aeolian.storage.tokens import Token

T = TypeVar("T")
DAY_S = 24 * 3600.0


@click.group()
def token() -> None:
    """List, make, disable and delete tokens of clients."""


@token.command("list")
@click.pass_obj
def list_tokens(data_dir: Path) -> None:
    """List the tokens; secrets are not kept, so none is shown."""
    settings = load_of(data_dir)
    tokens = _with_tokens(settings, lambda tokens: tokens.all())
    tables.console().print(table(tokens, connected_id(settings), SystemClock().now()))


@token.command()
@click.argument("name")
@click.option("--expires-in-days", type=click.FloatRange(0, min_open=True), help="Default: it does not expire.")
@click.pass_obj
def create(data_dir: Path, name: str, expires_in_days: float | None) -> None:
    """Make a token called NAME and print its secret, this once."""
    settings = load_of(data_dir)
    expires_at = SystemClock().now() + expires_in_days * DAY_S if expires_in_days else 0.0
    token_id, secret = _with_tokens(
        settings, lambda tokens: tokens.create(name, settings.workspace, expires_at=expires_at)
    )
    click.echo(f"export MODAL_SERVER_URL={shlex.quote(settings.grpc_url)}")
    click.echo(f"export MODAL_TOKEN_ID={token_id}")
    click.echo(f"export MODAL_TOKEN_SECRET={secret}")
    click.echo("The secret is not kept: this is the only time that it is shown.", err=True)


@token.command()
@click.argument("token_id")
@click.pass_obj
def disable(data_dir: Path, token_id: str) -> None:
    """Refuse a token until it is enabled again."""
    settings = load_of(data_dir)
    _with_tokens(settings, lambda tokens: tokens.set_disabled(token_id, True))
    click.echo(f"{token_id} is disabled; a running server refuses it within {RECHECK_S:g} s.")


@token.command()
@click.argument("token_id")
@click.pass_obj
def enable(data_dir: Path, token_id: str) -> None:
    """Accept a disabled token again."""
    _with_tokens(load_of(data_dir), lambda tokens: tokens.set_disabled(token_id, False))
    click.echo(f"{token_id} is enabled.")


@token.command()
@click.argument("token_id")
@click.pass_obj
def delete(data_dir: Path, token_id: str) -> None:
    """Delete a token for good."""
    settings = load_of(data_dir)
    _with_tokens(settings, lambda tokens: tokens.delete(token_id))
    click.echo(f"{token_id} is deleted; a running server refuses it within {RECHECK_S:g} s.")
    if token_id == connected_id(settings):
        click.echo(
            "It was the one that `aeolian connect` hands out: the next start of `aeolian up` makes another.", err=True
        )


def table(tokens: list[Token], connected_id: str, now: float) -> Table:
    """`connected_id`: the one that `aeolian connect` hands out."""
    rows = tables.table("token", "name", "state", "made", "last used", "expires", whole=("token",))
    for item in tokens:
        name = f"{item.name} (aeolian connect)" if item.token_id == connected_id else item.name
        expires = _date(item.expires_at) if item.expires_at else "never"
        used = _date(item.last_used_at) if item.last_used_at else "never"
        rows.add_row(item.token_id, name, _state(item, now), _date(item.created_at), used, expires)
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


def _with_tokens(settings: Settings, do: Callable[[Tokens], Awaitable[T]]) -> T:
    async def run() -> T:
        database = open_database(settings)
        database.open()
        try:
            return await do(Tokens(database, SystemClock(), key=b""))
        finally:
            await database.close()

    return asyncio.run(run())
