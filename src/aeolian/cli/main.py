"""The `aeolian` command. Each subcommand is a module of this room, loaded when it is asked for."""

import errno
import importlib
import os
from pathlib import Path

import click

from aeolian import __version__
from aeolian.domain.errors import AeolianError

COMMANDS = {
    "up": "aeolian.cli.up",
    "connect": "aeolian.cli.connect",
    "status": "aeolian.cli.status",
    "token": "aeolian.cli.token",
    "backup": "aeolian.cli.backup",
    "restore": "aeolian.cli.restore",
    "gc": "aeolian.cli.gc",
    "quota": "aeolian.cli.quota",
    "audit": "aeolian.cli.audit",
    "doctor": "aeolian.cli.doctor",
}


def default_data_dir() -> Path:
    """`$XDG_DATA_HOME/aeolian`, as a program's own data is kept by the XDG base directory specification."""
    return Path(os.environ.get("XDG_DATA_HOME") or "~/.local/share").expanduser() / "aeolian"


def _data_dir_option(command: click.Command) -> None:
    """`--data-dir` after the subcommand, as people write it; the command gets it as its `obj`."""

    def remember(context: click.Context, _parameter: click.Parameter, value: Path) -> None:
        context.obj = value

    command.params.insert(
        0,
        click.Option(
            ["--data-dir"],
            type=click.Path(path_type=Path, file_okay=False),
            envvar="AEOLIAN_DATA_DIR",
            default=default_data_dir,
            show_default="~/.local/share/aeolian",
            expose_value=False,
            callback=remember,
            help="Where everything is kept.",
        ),
    )


class _Commands(click.Group):
    def list_commands(self, _context: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, _context: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        command = getattr(importlib.import_module(COMMANDS[name]), name)
        for leaf in command.commands.values() if isinstance(command, click.Group) else [command]:
            if all(parameter.name != "data_dir" for parameter in leaf.params):
                _data_dir_option(leaf)
        return command

    def invoke(self, context: click.Context):
        try:
            return super().invoke(context)
        except AeolianError as error:
            raise click.ClickException(error.message) from error
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            where = f" of {error.filename}" if error.filename else ""
            raise click.ClickException(f"the disk{where} is full: free some space, then try again") from error


@click.command(cls=_Commands)
@click.version_option(__version__, prog_name="aeolian")
def main() -> None:
    """A self-hosted serverless cloud, driven by the official modal client."""


if __name__ == "__main__":
    main()
