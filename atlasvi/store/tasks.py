"""Dask tasks, a bounded number at a time, that stop cleanly when one fails or Ctrl-C is pressed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from dask import compute, delayed, threaded  # type: ignore[attr-defined]
from dask.callbacks import Callback

from atlasvi.memory import give_back

# A task that Dask knows of takes about 8 kB, and there are more the more cells there are.
_AT_ONCE = 128

Item = TypeVar("Item")
Progress = Callable[[str, int, int], None]


def run_tasks(
    function: Callable[[Item], None],
    items: Sequence[Item],
    sizes: Sequence[int],
    *,
    label: str,
    workers: int,
    progress: Progress | None,
    give_up: Callable[[], None] | None = None,
) -> None:
    """Call ``function`` on each item, ``workers`` at a time, in about the order given.

    Args:
        function: works by side effects, safe to call from several threads.
        items: one a task.
        sizes: cells of each item, for the progress.
        label: what is being done.
        workers: number of threads.
        progress: called with (label, cells done, cells in all) as tasks end.
        give_up: called where a task fails or Ctrl-C is pressed, before the tasks under way are waited for.
    """
    # Dask begins with the last of tasks that depend on nothing; the first rows first reads files in order.
    names = [f"{label}-{k:09d}" for k in reversed(range(len(items)))]
    call = delayed(function, pure=False)
    pool = ThreadPoolExecutor(workers, thread_name_prefix="atlasvi")
    try:
        with _Report(dict(zip(names, sizes, strict=True)), label, progress):
            for first in range(0, len(items), _AT_ONCE):
                some = slice(first, first + _AT_ONCE)
                todo = [call(item, dask_key_name=n) for item, n in zip(items[some], names[some], strict=True)]
                # By its name Dask would look for a cluster first, and import distributed for that: a second.
                compute(*todo, scheduler=threaded.get, pool=pool, optimize_graph=False)  # type: ignore[no-untyped-call]
    except BaseException:
        if give_up is not None:
            give_up()
        raise
    finally:
        # The tasks under way write files: whoever cleans up must not run beside them.
        pool.shutdown(wait=True, cancel_futures=True)
        # What they freed lies between what is still held; the next tasks may want other sizes.
        give_back()


class _Report(Callback):
    def __init__(self, sizes: dict[str, int], label: str, progress: Progress | None) -> None:
        super().__init__(posttask=self._done)  # type: ignore[no-untyped-call]
        self._sizes, self._label, self._progress = sizes, label, progress
        self._total, self._so_far = sum(sizes.values()), 0

    def _done(self, key: Any, result: Any, dsk: Any, state: Any, worker: Any) -> None:
        self._so_far += self._sizes.get(str(key), 0)
        if self._progress is not None:
            self._progress(self._label, self._so_far, self._total)
