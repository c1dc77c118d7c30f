"""How the autoscaler fares: loads are replayed in virtual time through the very function that the server calls.

    python benchmarks/autoscaler [--png autoscaler.png] [--cores 8] [--start-s 0.3]

Prints one table and, where matplotlib is there (`pip install 'aeolian[bench]'`), draws containers, queue and waiting
time into a PNG: beside Knative's autoscaler, and beside a container for each input.
"""

import time
from pathlib import Path

import click
from policies import POLICIES
from rich.console import Console
from rich.table import Table
from simulation import Outcome, simulate
from traces import all_traces


@click.command()
@click.option(
    "--png", type=click.Path(dir_okay=False, path_type=Path), default=Path("autoscaler.png"), show_default=True
)
@click.option("--cores", "num_cores", default=8, show_default=True, help="Cores of the simulated machine.")
@click.option("--start-s", default=0.3, show_default=True, help="How long one container takes to start.")
@click.option("--slots", default=1, show_default=True, help="Inputs that a container takes at a time.")
def main(png: Path, num_cores: int, start_s: float, slots: int) -> None:
    begun_at = time.perf_counter()
    outcomes = [
        simulate(trace, policy(), num_cores=num_cores, start_s=start_s, slots=slots)
        for trace in all_traces()
        for policy in POLICIES
    ]
    console = Console()
    console.print(table(outcomes))
    console.print(
        f"{sum(len(outcome.waits) for outcome in outcomes):,} inputs in {time.perf_counter() - begun_at:.1f} s"
    )
    try:
        import plot
    except ImportError:
        console.print("no picture without matplotlib: pip install 'aeolian\\[bench]'")
        return
    plot.draw(outcomes, all_traces(), png)
    console.print(f"picture: {png}")


def table(outcomes: list[Outcome]) -> Table:
    columns = (
        "container-seconds",
        "wait p50 (s)",
        "wait p95 (s)",
        "wait max (s)",
        "starts",
        "needless",
        "most at once",
    )
    result = Table("load", "policy", title="Autoscaling policies")
    for column in columns:
        result.add_column(column, justify="right")
    before = ""
    for outcome in outcomes:
        if before and before != outcome.trace:
            result.add_section()
        result.add_row(
            "" if outcome.trace == before else outcome.trace,
            outcome.policy,
            f"{outcome.container_s:,.0f}",
            *(f"{outcome.wait_at(share):.2f}" for share in (0.5, 0.95, 1.0)),
            *(f"{number:,}" for number in (outcome.num_starts, outcome.num_needless, outcome.most)),
        )
        before = outcome.trace
    return result


if __name__ == "__main__":
    main()
