"""The picture: a row for each load, with containers and queue over time and the waiting times, one line a policy."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from simulation import Outcome
from traces import Trace

COLOURS = {"aeolian": "tab:blue", "knative": "tab:orange", "queue length": "tab:green"}


def draw(outcomes: list[Outcome], traces: list[Trace], path: Path) -> None:
    figure, rows = plt.subplots(len(traces), 3, figsize=(16, 3.1 * len(traces)), squeeze=False)
    for (containers, queue, wait), trace in zip(rows, traces, strict=True):
        mine = [outcome for outcome in outcomes if outcome.trace == trace.name]
        for outcome in reversed(mine):  # ours on top
            line = {"label": outcome.policy, "color": COLOURS[outcome.policy], "linewidth": 1.2}
            at = [sample.at for sample in outcome.samples]
            containers.step(at, [sample.num_containers for sample in outcome.samples], where="post", **line)
            queue.step(at, [sample.num_queued for sample in outcome.samples], where="post", **line)
            waits = sorted(outcome.waits)
            wait.plot([100 * number / len(waits) for number in range(len(waits))], waits, **line)
        containers.set_xlim(0, trace.length_s)
        queue.set_xlim(*trace.zoom)
        wait.set_xlim(0, 100)
        for axes, title in ((containers, "containers"), (queue, "queued inputs"), (wait, "waiting time (s)")):
            axes.set_title(f"{trace.name}: {title}", fontsize=10)
            axes.set_yscale("symlog", linthresh=0.1 if axes is wait else 1)
            axes.set_ylim(bottom=0)
            axes.grid(alpha=0.3)
    rows[0][0].legend(fontsize=8)
    for axes, label in zip(
        rows[-1], ("time (s)", "time (s)", "share of the inputs that waited no longer (%)"), strict=True
    ):
        axes.set_xlabel(label)
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    plt.close(figure)
