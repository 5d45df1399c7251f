"""Memory does not grow with the number of cells, and a limit that an in-memory copy breaks is kept.

The command `python -m benchmarks.scale.memory` measures, a process for each number of cells; here on narrow
cells and with small buffers, so that 20,000 cells already fill each several times (and are more than ingest
would keep in memory to spare itself a second reading), on one core, where readers and writers do not now and
then coincide, and without the free blocks that malloc keeps.
"""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FEW, MANY = 20_000, 160_000
STAGES = ("ingest", "train", "decode", "decode-all", "impute", "de", "evaluate")
# What training holds of each cell (docs/limits.md): its place in the split takes 4 bytes, the offset of its
# row 2, its batch 1, the plan of blocks as small as they are here 3; the rest is for what the machine adds.
BYTES_A_CELL = {"train": 12}
# MiB above the level. The counts of the larger store are 159 MiB in the narrowest types.
LIMIT = 140

pytestmark = [
    pytest.mark.scale,
    pytest.mark.timeout(600),
    pytest.mark.skipif(sys.platform != "linux", reason="anonymous memory and its limit are read from /proc"),
]


@pytest.fixture(scope="module")
def measure(tmp_path_factory):
    """``measure(stages, cells, *options) -> peaks by (stage, cells)``, bytes or None where refused."""
    folder = tmp_path_factory.mktemp("memory")

    def run(stages, cells, *options):
        out = folder / f"{stages[0]}-{max(cells)}.json"
        done = subprocess.run(
            [
                sys.executable, "-m", "benchmarks.scale.memory", "--stage", *stages,
                "--cells", *map(str, cells), "--folder", str(folder), "--out", str(out), "--repeats", "1",
                "--genes", "600", "--counts", "1500", "--repeat", "4000", "--stream-budget", str(3 << 19),
                "--ingest-budget", str(16 << 20), "--hidden", "64", "--live", "1", "--cores", "1",
                "--workers", "1", "--together", "1", *options,
            ],
            cwd=ROOT, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        runs = json.loads(out.read_text())["runs"]
        return {(found["stage"], found["cells"]): found["peak"] for found in runs}

    run(["simulate"], [FEW, MANY], "--work", "0")
    return run


@pytest.fixture(scope="module")
def peaks(measure):
    """Few cells are gone through several times: a peak is found the higher the longer one looks."""
    with ThreadPoolExecutor(2) as pool:
        many = pool.submit(measure, STAGES, [MANY], "--work", "0", "--limit", str(LIMIT))
        few = pool.submit(measure, STAGES, [FEW], "--work", str(4 * FEW))
        return few.result() | many.result()


@pytest.mark.parametrize("stage", STAGES)
def test_eight_times_the_cells_take_a_tenth_more_memory_at_most_but_for_what_is_held_of_each(
    peaks, measure, stage
):
    few, many = peaks[stage, FEW], peaks[stage, MANY]
    held = BYTES_A_CELL.get(stage, 0) * (MANY - FEW)
    if many - held >= 1.1 * few:  # buffers that happened to be full at once: the lower of two looks, of both
        many = min(many, measure([stage], [MANY], "--work", "0")[stage, MANY])
        few = min(few, measure([stage], [FEW], "--work", str(4 * FEW))[stage, FEW])
    found = f"{few / 2**20:.1f} MiB for {FEW:,} cells, {many / 2**20:.1f} for {MANY:,}"
    assert many - held < 1.1 * few, found


def test_all_of_it_runs_under_a_limit_that_breaks_a_copy_in_memory(peaks, measure):
    assert all(peaks[stage, MANY] is not None for stage in STAGES)
    control = measure(["load"], [FEW, MANY], "--limit", str(LIMIT))
    assert control["load", FEW] is not None, "the control must fail for its size and for nothing else"
    assert control["load", MANY] is None, "the limit is above an in-memory copy: it shows nothing"
