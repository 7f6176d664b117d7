"""What the terminal shows: progress bars, notes, tables, errors. Everything but results goes to stderr."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.table import Table

from ..progress import Advance, Progress

# A pipe or a file has no width: tables are then as wide as they need.
out = Console() if sys.stdout.isatty() else Console(width=int(os.environ.get("COLUMNS", 160)))
err = Console(stderr=True)


class BarProgress(Progress):
    """Progress bars with an estimate of the time left, on stderr."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.quiet = quiet

    @contextmanager
    def step(self, title: str, total: int) -> Iterator[Advance]:
        if self.quiet:
            yield lambda n=1: None
            return
        columns = (TextColumn("{task.description:<24}"), BarColumn(30), TextColumn("{task.percentage:3.0f}%"), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
        with Bars(*columns, console=err) as bars:
            task = bars.add_task(title, total=total)
            yield lambda n=1: bars.advance(task, n)
            bars.update(task, completed=total)

    def note(self, message: str) -> None:
        if not self.quiet:
            err.print(f"[dim]note[/] {plain(message)}", highlight=False, soft_wrap=True)


def plain(text: object, most: int = 4000) -> str:
    """Text that comes from a file, for the terminal: nothing in it is markup, moves the cursor or hides, and it is cut at most characters."""
    shown = str(text)
    shown = shown if len(shown) <= most else f"{shown[:most]} ... ({len(shown):,} characters)"
    return escape("".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in shown))


def print_json(data: Any) -> None:
    """One JSON document on stdout; NaN (an interval of a single window) becomes null."""
    sys.stdout.write(json.dumps(_clean(data), indent=2, default=str) + "\n")


def _clean(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(key): _clean(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_clean(item) for item in value]
    return value


def table(*columns: str, title: str | None = None) -> Table:
    """A plain table: the first column to the left, numbers to the right."""
    made = Table(title=title, title_justify="left", header_style="bold", box=None, pad_edge=False)
    for i, column in enumerate(columns):
        made.add_column(column, justify="left" if i == 0 else "right", no_wrap=True)
    return made


def text_table(*columns: str, title: str | None = None) -> Table:
    """A plain table of words: all columns to the left, the last one wrapped."""
    made = Table(title=title, title_justify="left", header_style="bold", box=None, pad_edge=False)
    for i, column in enumerate(columns):
        made.add_column(column, no_wrap=i < len(columns) - 1)
    return made


def comparison_tables(comparison) -> list[Table]:
    """The table of DESIGN section 5 in two parts that fit 80 columns: size and perplexity, then the distance from the original."""
    size = table("model", "MB", "bits/w", "linears", "ppl full", "95%", "ppl 2nd half")
    loss = table("model", "KL full", "95%", "median", "p99", "top-1 %", "KL 2nd half")
    for row in comparison.rows:
        full, half = row.summaries["full"], row.summaries["llama.cpp"]
        sizes = f"{row.size.file_bytes / 1e6:.1f}", f"{row.size.bits_per_weight:.2f}", f"{row.size.linear_bits:.2f}"
        size.add_row(plain(row.name), *sizes, f"{full.perplexity.value:.2f}", _interval(full.perplexity, 2), f"{half.perplexity.value:.2f}")
        if full.kl_mean is not None:
            loss.add_row(plain(row.name), *_loss(full, half))
    if comparison.noise_floor:
        loss.add_row("noise floor", *_loss(comparison.noise_floor["full"], comparison.noise_floor["llama.cpp"]), style="dim")
    return [size, loss] if loss.row_count else [size]


def _loss(full, half) -> tuple[str, ...]:
    return (
        f"{full.kl_mean.value:.4f}", _interval(full.kl_mean, 4), f"{full.kl_median.value:.4f}", f"{full.kl_p99.value:.3f}", f"{100 * full.agreement.value:.1f}", f"{half.kl_mean.value:.4f}"
    )  # fmt: skip


def _interval(estimate, digits: int) -> str:
    return "-" if math.isnan(estimate.low) else f"{estimate.low:.{digits}f}-{estimate.high:.{digits}f}"
