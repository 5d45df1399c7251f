"""From an atlas to minibatches: the order of an epoch, reading ahead, gathering, packing."""

from atlasvi.stream.blocks import stream_blocks
from atlasvi.stream.epochs import Epochs
from atlasvi.stream.minibatch import gather, pack, pack_uncounted
from atlasvi.stream.on_device import Room
from atlasvi.stream.plan import (
    MEMORY_BUDGET,
    EpochPlan,
    Unit,
    as_budget,
    balance_weights,
    count_minibatches,
    default_sizes,
    plan_epoch,
)
from atlasvi.stream.read import default_workers, read_units

__all__ = [
    "MEMORY_BUDGET",
    "EpochPlan",
    "Epochs",
    "Room",
    "Unit",
    "as_budget",
    "balance_weights",
    "count_minibatches",
    "default_sizes",
    "default_workers",
    "gather",
    "pack",
    "pack_uncounted",
    "plan_epoch",
    "read_units",
    "stream_blocks",
]
