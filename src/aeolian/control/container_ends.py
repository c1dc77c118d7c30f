"""How a container ended, in words for those who waited for it."""

from collections.abc import Sequence

from aeolian.domain.containers import ExitStatus


def explain(task_id: str, exit: ExitStatus, last_lines: Sequence[str] = (), did: str = "") -> str:
    """`did`: what it was doing, as in "could not start: it"."""
    subject = f"container {task_id} {did}".rstrip()
    if exit.oom_killed:
        sentence = f"{subject} ran out of memory and was killed: ask for more with `memory=`"
    elif exit.disk_full:
        sentence = (
            f"{subject} {exit.disk_full}, so it was killed: ask for more with `ephemeral_disk=`, or write to a Volume"
        )
    elif exit.reason:
        sentence = f"{subject} ended: {exit.reason}"
    elif exit.exit_code < 0:
        sentence = f"{subject} was killed by signal {-exit.exit_code}"
    else:
        sentence = f"{subject} ended by itself with exit code {exit.exit_code}"
    return sentence + quoted(last_lines)


def quoted(last_lines: Sequence[str]) -> str:
    """What it wrote last, below a sentence."""
    if not last_lines:
        return ""
    return "\nThe last lines that it wrote:\n" + "\n".join(f"    {line}" for line in last_lines)
