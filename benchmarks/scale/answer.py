"""The side of a `benchmarks.common.Worker` that answers: epochs timed and checked. Needs numpy alone."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.scale.inputs import Content

Minibatch = tuple[Any, Any]


def answer(actions: Mapping[str, Callable[..., Any]]) -> None:
    """Do what the lines of standard input ask, until it is closed."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer
    for line in sys.stdin:
        request = json.loads(line)
        do = actions[request.pop("do")]
        answers.write(json.dumps(do(**request)) + "\n")
        answers.flush()


def check_and_time(
    epochs: Mapping[str, Callable[..., Iterator[Minibatch]]], arrays: Callable[[Any], Any]
) -> dict[str, Callable[..., Any]]:
    """The actions of a side that has loaders.

    Args:
        epochs: by contender, what makes the minibatches of an epoch: ``(counts, numbers of the cells)``.
        arrays: ``(indptr, indices, data)`` of such counts.
    """

    def epoch(who: str, setting: dict[str, Any]) -> dict[str, float]:
        disk, cpu, all_cpu, n = read_from_disk(), time.process_time(), seconds_of_all(), 0
        begun = time.perf_counter()
        for _, rows in epochs[who](**setting):
            n += len(rows)
        seconds = time.perf_counter() - begun
        cpu = time.process_time() - cpu
        return {
            "seconds": seconds, "cpu": cpu, "others": max(0.0, seconds_of_all() - all_cpu - cpu),
            "disk": read_from_disk() - disk, "cells": n,
        }  # fmt: skip

    def check(who: str, setting: dict[str, Any]) -> dict[str, Any]:
        return checked(((*arrays(counts),), rows) for counts, rows in epochs[who](**setting))

    return {"epoch": epoch, "check": check, "about": versions, "peak": peak}


def checked(minibatches: Iterable[tuple[tuple[np.ndarray, ...], np.ndarray]]) -> dict[str, Any]:
    """What the minibatches of an epoch held together, and whether each cell came once."""
    content, numbers = Content(), []
    for counts, rows in minibatches:
        content += Content.of(*counts)
        numbers.append(np.array(rows))
    seen = np.sort(np.concatenate(numbers))
    return {"content": asdict(content), "once": bool((seen == np.arange(len(seen))).all())}


def versions(packages: list[str]) -> dict[str, str]:
    """Of some packages."""
    return {name: metadata.version(name) for name in packages}


def peak() -> int:
    """The most bytes this process held in memory, files it mapped included."""
    return _of_process("status", r"VmHWM:\s+(\d+) kB") << 10


def seconds_of_all() -> float:
    """CPU time that all processes of this machine have had so far, and that its host took."""
    user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def read_from_disk() -> int:
    """Bytes this process had fetched from a disk so far: those in the page cache are not among them."""
    return _of_process("io", r"read_bytes: (\d+)")


def warm(folder: Path) -> None:
    """Have the system cache the files in a folder; on some machines it forgets them by and by."""
    for path in folder.rglob("*"):
        if path.is_file():
            path.read_bytes()


def evict(folder: Path) -> None:
    """Have the system forget what it has cached of the files in a folder."""
    for path in folder.rglob("*"):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)  # what is not on the disk yet would stay
                os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(handle)


def size_of(folder: Path) -> int:
    """Bytes of the files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _of_process(file: str, pattern: str) -> int:
    found = re.search(pattern, Path(f"/proc/self/{file}").read_text())
    assert found is not None
    return int(found[1])
