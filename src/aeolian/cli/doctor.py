"""`aeolian doctor`: says what this host offers, which runtime would be taken, and what to install for the rest."""

import asyncio
from itertools import groupby
from pathlib import Path

import click
import msgspec
from rich.console import Group, RenderableType
from rich.text import Text

from aeolian.cli.host_report import Finding, HostReport, host_report
from aeolian.cli.tables import console, table

APT_INSTALL = "apt install "


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead.")
@click.pass_obj
def doctor(data_dir: Path, as_json: bool) -> None:
    """Say what this host offers, and what to install for the rest."""
    found = asyncio.run(host_report(data_dir.expanduser()))
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(found)))
    else:
        console().print(page(found))


def page(found: HostReport) -> RenderableType:
    blocks: list[RenderableType] = [f"Aeolian {found.version} on {found.host}"]
    for group, findings in groupby(found.findings, key=lambda finding: finding.group):
        rows = table("", "what", "how", "remedy", whole=("", "what"), show_header=False)
        for finding in findings:
            mark = Text("-", style="yellow") if finding.is_missing else Text("+", style="green")
            rows.add_row(mark, finding.name, finding.says, Text(finding.remedy, style="bold"))
        blocks += ["", Text(group[0].upper() + group[1:], style="bold"), rows]
    blocks += ["", f"Containers run on the {found.runtime} runtime, unless --runtime says otherwise."]
    if packages := packages_to_install(found.findings):
        blocks.append(f"To have the rest: {APT_INSTALL}{' '.join(packages)}")
    return Group(*blocks)


def packages_to_install(findings: tuple[Finding, ...]) -> list[str]:
    """Debian's names of what is missing, each once."""
    named = [
        package
        for finding in findings
        if finding.is_missing and finding.remedy.startswith(APT_INSTALL)
        for package in finding.remedy.removeprefix(APT_INSTALL).split()
    ]
    return list(dict.fromkeys(named))
