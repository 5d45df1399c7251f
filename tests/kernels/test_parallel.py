"""Loops on torch's own threads: each range once, errors raised, in forked processes too."""

from __future__ import annotations

import multiprocessing
import threading

import pytest
import torch

from atlasvi_kernels import parallel


def ranges(n_items: int, parts: int) -> tuple[list[tuple[int, int, int]], set[int]]:
    found: list[tuple[int, int, int]] = []
    threads: set[int] = set()
    # Nobody goes on before as many threads are here as can be.
    together = threading.Barrier(min(parts, torch.get_num_threads()))

    def take(part: int, start: int, stop: int) -> None:
        if part < together.parties:
            together.wait(10)
        found.append((part, start, stop))
        threads.add(threading.get_ident())

    parallel.in_parallel(take, n_items, parts=parts)
    return sorted(found), threads


@pytest.mark.parametrize("parts", [1, 2, 5])
@pytest.mark.parametrize("n_items", [0, 1, 7])
def test_the_ranges_cover_the_items_once(n_items: int, parts: int) -> None:
    found, threads = ranges(n_items, parts)
    assert [part for part, _, _ in found] == list(range(parts))
    assert [i for _, start, stop in found for i in range(start, stop)] == list(range(n_items))
    assert len(threads) == min(parts, torch.get_num_threads())


@pytest.mark.parametrize("failing", [0, 1])
def test_an_error_of_any_part_is_raised(failing: int) -> None:
    def fail(part: int, start: int, stop: int) -> None:
        if part == failing:
            raise ValueError(f"part {part}")

    with pytest.raises(ValueError, match=f"part {failing}"):
        parallel.in_parallel(fail, 4, parts=2)


def _in_child(answer: multiprocessing.SimpleQueue[list[tuple[int, int, int]]]) -> None:
    answer.put(ranges(6, 2)[0])


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_forked_process_has_threads_of_its_own() -> None:
    ranges(6, 2)  # this process has its team
    context = multiprocessing.get_context("fork")
    answer = context.SimpleQueue()
    child = context.Process(target=_in_child, args=(answer,))
    child.start()
    child.join(30)
    assert child.exitcode == 0
    assert answer.get() == [(0, 0, 3), (1, 3, 6)]
