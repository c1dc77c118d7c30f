"""`aeolian quota`: how much an environment's containers may have together. Works on the database, whether or not the
server runs; a running server goes by what is said here within seconds."""

from pathlib import Path

import click

from aeolian.cli import tables
from aeolian.cli.people import LOCAL, People, with_people
from aeolian.cli.settings import load_of
from aeolian.control.environments import RECHECK_S
from aeolian.domain.errors import InvalidArgument
from aeolian.storage.environments import Environment

MIB_PER_GIB = 1024


@click.group()
def quota() -> None:
    """List and set how much an environment's containers may have together."""


@quota.command("list")
@click.pass_obj
def list_quotas(data_dir: Path) -> None:
    """List the environments with their quotas."""

    async def read(people: People) -> list[Environment]:
        return people.environments.all()

    rows = tables.table("environment", "containers", "CPU cores", "memory GiB", "GPUs", "its containers reach")
    for one in with_people(load_of(data_dir), read):
        rows.add_row(
            one.name,
            _shown(one.max_containers),
            _shown(one.max_milli_cpu / 1000),
            _shown(one.max_memory_mb / MIB_PER_GIB),
            _shown(one.max_gpus),
            "itself only" if one.is_restricted else "all environments",
        )
    tables.console().print(rows)


@quota.command("set")
@click.argument("environment")
@click.option("--containers", type=click.IntRange(0, 1_000_000), help="How many at a time; 0: any number.")
@click.option("--cpu", type=click.FloatRange(0, 1_000_000), help="CPU cores that they reserve together; 0: any.")
@click.option("--memory", type=click.FloatRange(0, 1_000_000), help="GiB of memory that they reserve together; 0: any.")
@click.option("--gpus", type=click.IntRange(0, 1_000_000), help="GPUs that they have together; 0: any number.")
@click.pass_obj
def set_quota(
    data_dir: Path,
    environment: str,
    containers: int | None,
    cpu: float | None,
    memory: float | None,
    gpus: int | None,
) -> None:
    """Set the quota of ENVIRONMENT: what is not given stays. What is more already is not stopped."""
    asked = {
        "max_containers": containers,
        "max_milli_cpu": None if cpu is None else round(cpu * 1000),
        "max_memory_mb": None if memory is None else round(memory * MIB_PER_GIB),
        "max_gpus": gpus,
    }
    limits = {name: value for name, value in asked.items() if value is not None}
    if not limits:
        raise InvalidArgument("nothing to set: give --containers, --cpu, --memory or --gpus")

    async def change(people: People) -> None:
        await people.environments.set_limits(environment, LOCAL, **limits)
        said = [f"{name}={value}" for name, value in limits.items()]
        await people.trail.record_local("quota set", environment, said)

    with_people(load_of(data_dir), change)
    click.echo(f"The quota of '{environment}' is set; a running server goes by it within {RECHECK_S:g} s.")


def _shown(number: float) -> str:
    return f"{number:g}" if number else "any"
