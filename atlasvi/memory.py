"""How much memory this process takes, and a watch that remembers the most it took."""

from __future__ import annotations

import ctypes
import math
import os
import re
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from atlasvi.errors import OptionError

_STATUS = Path("/proc/self/status")
_M_ARENA_MAX = -8  # of malloc.h


def use_one_heap() -> None:
    """Have glibc keep one heap for all threads, unless ``MALLOC_ARENA_MAX`` says otherwise.

    By default it keeps up to eight a core, and large blocks that one thread has freed stay with that thread's
    heap: readers, writers and encoders together then hold two to three times what is in use. Our threads
    allocate megabytes at a time, so they do not wait for each other. Elsewhere than glibc nothing happens.
    """
    if "MALLOC_ARENA_MAX" not in os.environ:
        _call_glibc("mallopt", _M_ARENA_MAX, 1)


def give_back() -> None:
    """Have glibc return to the system what it keeps of freed memory: milliseconds, between stages of work."""
    _call_glibc("malloc_trim", 0)


def _call_glibc(name: str, *arguments: int) -> None:
    function = getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
    if function is not None:
        function(*arguments)


def anonymous_bytes() -> int:
    """Bytes in RAM that are backed by no file: shared libraries and cached pages of a store do not count.

    On systems without /proc it is the largest size of the process so far.
    """
    return _read("RssAnon")


def resident_bytes() -> int:
    """Bytes in RAM, shared libraries and mapped files included; without /proc the largest so far."""
    return _read("VmRSS")


def _read(field: str) -> int:
    if _STATUS.exists():
        found = re.search(rf"{field}:\s+(\d+) kB", _STATUS.read_text())
        if found:
            return int(found[1]) << 10
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak << 10


def available_bytes(root: Path = Path("/")) -> int | None:
    """Bytes that this process could still take: what the system can give, within the limits of its cgroups.

    Pages of files that can be dropped count as free. ``None`` where neither is known (elsewhere than Linux).

    Args:
        root: of the file system with ``proc`` and ``sys``.
    """
    free = []
    meminfo = root / "proc/meminfo"
    if meminfo.is_file():
        found = re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text())
        free += [int(found[1]) << 10] if found else []
    groups = root / "proc/self/cgroup"
    for line in groups.read_text().splitlines() if groups.is_file() else ():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            free += _free_of_groups(
                root / "sys/fs/cgroup", path, "memory.max", "memory.current", "inactive_file"
            )
        elif "memory" in controllers.split(","):
            free += _free_of_groups(
                root / "sys/fs/cgroup/memory", path,
                "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file",
            )  # fmt: skip
    return max(0, min(free)) if free else None


def _free_of_groups(mount: Path, path: str, limit: str, usage: str, cached: str) -> list[int]:
    """Of a cgroup and those it is in, as far as they can be seen from here, those that have a limit."""
    free = []
    group = mount / path.lstrip("/")
    for folder in (group, *group.parents):
        if (folder / limit).is_file() and (folder / usage).is_file():
            most = (folder / limit).read_text().strip()
            if most != "max":
                stat = (folder / "memory.stat").read_text() if (folder / "memory.stat").is_file() else ""
                found = re.search(rf"^{cached} (\d+)$", stat, re.MULTILINE)
                free.append(int(most) - int((folder / usage).read_text()) + (int(found[1]) if found else 0))
        if folder == mount:
            break
    return free


def as_bytes(memory_budget: int | str) -> int:
    """Bytes, from a number or from text such as ``"500MB"`` or ``"4 GiB"``.

    Raises:
        OptionError: text that is no size, or less than a byte.

    Example:
        >>> as_bytes("4GB"), as_bytes("1 MiB"), as_bytes(7)
        (4000000000, 1048576, 7)
    """
    from dask.utils import parse_bytes  # not on import: it takes longer than all of this module

    try:
        if isinstance(memory_budget, str):
            # Dask takes a unit alone, or nothing, for one of it.
            n_bytes = int(parse_bytes(memory_budget)) if any(map(str.isdigit, memory_budget)) else 0
        else:
            n_bytes = math.floor(memory_budget)  # int() would read b"1" too
    except (TypeError, ValueError, OverflowError):
        n_bytes = 0
    if n_bytes < 1:
        raise OptionError(
            f"memory_budget={memory_budget!r} cannot be: give bytes, at least 1, or text like '4GB'"
        )
    return n_bytes


class Watch:
    """Time and peak memory of a block of code, sampled every few milliseconds by a thread.

    Example:
        >>> with Watch() as watch:
        ...     _ = bytearray(50_000_000)
        >>> watch.peak_bytes > 0 and watch.seconds > 0
        True
    """

    def __init__(self, measure: Callable[[], int] = anonymous_bytes, interval: float = 0.005) -> None:
        self.measure = measure
        self.interval = interval
        self.before_bytes = 0
        self.peak_bytes = 0
        self.seconds = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="atlasvi-memory", daemon=True)

    def __enter__(self) -> Watch:
        self.before_bytes = self.peak_bytes = self.measure()
        self._started = time.perf_counter()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.seconds = time.perf_counter() - self._started
        self._stop.set()
        self._thread.join()
        self.peak_bytes = max(self.peak_bytes, self.measure())

    def _sample(self) -> None:
        while not self._stop.wait(self.interval):
            self.peak_bytes = max(self.peak_bytes, self.measure())
