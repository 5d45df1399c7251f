"""From an atlas to minibatches: the order of an epoch, reading ahead, packing."""

from atlasvi.stream.minibatch import pack, stream_blocks, stream_counts, stream_minibatches
from atlasvi.stream.plan import (
    MEMORY_BUDGET,
    EpochPlan,
    Unit,
    count_minibatches,
    default_sizes,
    plan_epoch,
)
from atlasvi.stream.read import default_workers, read_units

__all__ = [
    "MEMORY_BUDGET",
    "EpochPlan",
    "Unit",
    "count_minibatches",
    "default_sizes",
    "default_workers",
    "pack",
    "plan_epoch",
    "read_units",
    "stream_blocks",
    "stream_counts",
    "stream_minibatches",
]
