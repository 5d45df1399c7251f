"""Progress bars on standard error: rate and time left, and a plain line when it is done."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

Advance = Callable[[int, str], None]
SECONDS_BETWEEN_LINES = 30.0


@contextmanager
def bar(
    description: str, total: int, unit: str, *, enabled: bool = True, at_most: bool = False
) -> Iterator[Advance]:
    """A bar for ``total`` units of work; gives a function ``(done so far, note)``.

    Without a terminal nothing moves: a line is printed every half minute, and one at the end.

    Args:
        description: what is being done.
        total: units in all.
        unit: name of a unit in the plural, such as ``"cells"``.
        enabled: ``False`` prints nothing.
        at_most: whether it may end before ``total``, and is whole then too.
    """
    if not enabled:
        yield _say_nothing
        return
    if not sys.stderr.isatty():
        started = said = time.perf_counter()
        so_far, last_note = 0, ""

        def say(end: str) -> None:
            seconds = time.perf_counter() - started
            rate = so_far / max(seconds, 1e-9)
            note = f", {last_note}" if last_note else ""
            line = f"{description}: {so_far:,} {unit} in {seconds:.1f} s ({rate:,.0f}/s){note}{end}"
            print(line, file=sys.stderr, flush=True)

        def remember(done: int, note: str = "") -> None:
            nonlocal so_far, last_note, said
            so_far, last_note = done, note
            if time.perf_counter() - said > SECONDS_BETWEEN_LINES:
                said = time.perf_counter()
                say(f", {'at most ' if at_most else ''}{total - done:,} to go")

        yield remember
        say("")
        return

    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=28),
        TextColumn("{task.percentage:>3.0f}%"),
        TextColumn("{task.fields[rate]}"),
        TextColumn("{task.fields[most]}"),
        TimeRemainingColumn(elapsed_when_finished=True),
        TextColumn("[dim]{task.fields[note]}"),
    )
    with Progress(*columns, console=Console(stderr=True), refresh_per_second=8) as progress:
        task = progress.add_task(
            description, total=total, rate="", note="", most="at most" if at_most else ""
        )
        first: tuple[int, float] | None = None

        def advance(done: int, note: str = "") -> None:
            # The rate counts from the first report: a run that is resumed starts far from zero.
            nonlocal first
            now = time.perf_counter()
            if first is None:
                first = done, now
            rate = (done - first[0]) / max(now - first[1], 1e-9)
            progress.update(task, completed=done, rate=f"{rate:,.0f} {unit}/s" if rate else "", note=note)

        yield advance
        if at_most:
            progress.update(task, total=progress.tasks[0].completed, most="")


@contextmanager
def stage_bars(unit: str, *, enabled: bool = True) -> Iterator[Callable[[str, int, int], None]]:
    """Bars for work that has stages: gives a function ``(stage, done, total)``; a new stage, a new bar."""
    with ExitStack() as stack:
        stage: list[str] = []
        advance: list[Advance] = []

        def step(name: str, done: int, total: int) -> None:
            if stage != [name]:
                stack.close()
                stage[:] = [name]
                advance[:] = [stack.enter_context(bar(name, total, unit, enabled=enabled))]
            advance[0](done, "")

        yield step


def _say_nothing(done: int, note: str = "") -> None:
    """The bar that is not shown."""
