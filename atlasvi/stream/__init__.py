"""From an atlas to minibatches: the order of an epoch, reading ahead, packing."""

from atlasvi.stream.minibatch import pack, stream_blocks, stream_counts, stream_minibatches
from atlasvi.stream.plan import MEMORY_BUDGET, EpochPlan, count_minibatches, default_sizes, plan_epoch
from atlasvi.stream.read import Buffer, default_workers, read_buffers

__all__ = [
    "MEMORY_BUDGET",
    "Buffer",
    "EpochPlan",
    "count_minibatches",
    "default_sizes",
    "default_workers",
    "pack",
    "plan_epoch",
    "read_buffers",
    "stream_blocks",
    "stream_counts",
    "stream_minibatches",
]
