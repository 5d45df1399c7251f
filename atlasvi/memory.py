"""How much memory this process takes, and a watch that remembers the most it took."""

from __future__ import annotations

import re
import sys
import threading
import time
from pathlib import Path
from types import TracebackType

_STATUS = Path("/proc/self/status")


def anonymous_bytes() -> int:
    """Bytes of this process that are backed by no file; on systems without /proc its largest size so far.

    Pages of the store that the kernel keeps cached, and shared libraries, do not count.
    """
    if _STATUS.exists():
        found = re.search(r"RssAnon:\s+(\d+) kB", _STATUS.read_text())
        if found:
            return int(found[1]) << 10
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak << 10


class Watch:
    """Time and peak memory of a block of code, sampled every few milliseconds by a thread.

    Example:
        >>> with Watch() as watch:
        ...     _ = bytearray(50_000_000)
        >>> watch.peak_bytes > 0 and watch.seconds > 0
        True
    """

    def __init__(self, interval: float = 0.005) -> None:
        self.interval = interval
        self.before_bytes = 0
        self.peak_bytes = 0
        self.seconds = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="atlasvi-memory", daemon=True)

    def __enter__(self) -> Watch:
        self.before_bytes = self.peak_bytes = anonymous_bytes()
        self._started = time.perf_counter()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.seconds = time.perf_counter() - self._started
        self._stop.set()
        self._thread.join()
        self.peak_bytes = max(self.peak_bytes, anonymous_bytes())

    def _sample(self) -> None:
        while not self._stop.wait(self.interval):
            self.peak_bytes = max(self.peak_bytes, anonymous_bytes())
