"""How commands print tables and sizes: plain columns, whole ids, and wide where nobody has set a width."""

import os
import sys
from collections.abc import Collection

from rich.console import Console
from rich.table import Table

WIDTH_OF_FILES = 200


def console() -> Console:
    """A terminal's own width; COLUMNS, or a wide line, where output goes to a file or another program."""
    is_free = not sys.stdout.isatty() and "COLUMNS" not in os.environ
    return Console(width=WIDTH_OF_FILES if is_free else None, highlight=False)


def table(*columns: str, whole: Collection[str] = (), numbers: Collection[str] = (), show_header: bool = True) -> Table:
    """`whole`: columns that are never broken (ids to copy); `numbers`: those set flush right."""
    made = Table(box=None, pad_edge=False, show_header=show_header, header_style="dim")
    for column in columns:
        is_number = column in numbers
        no_wrap = is_number or column in whole
        made.add_column(column, justify="right" if is_number else "left", no_wrap=no_wrap, overflow="fold")
    return made


def byte_count(count: int) -> str:
    """In the unit that fits: `12 MiB`."""
    size = float(count)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"
