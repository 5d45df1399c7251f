"""How much memory training takes, before it begins: from shapes alone, and beside what there is.

At its highest a run holds the weights, their gradients (those of the last step until those of this one are
there), Adam's two moments, averaged and best weights where the schedule has them, and one copy more while it
looks at validation with averaged weights; a minibatch with what its layers keep for backward; and the blocks
of counts on their way.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass

import torch
from torch import nn

from atlasvi.errors import OptionError
from atlasvi.memory import available_bytes
from atlasvi.nn import ranks
from atlasvi.nn.layers import InputLinear
from atlasvi.store.atlas import Atlas
from atlasvi.stream import Room, as_budget
from atlasvi.train.schedule import TrainingPlan

logger = logging.getLogger("atlasvi")

DEFAULT_BATCH_SIZE = 128
_POWERS = (512, 256, 128, 64, 32, 16)
# Looking keeps nothing for backward, so it goes through more cells at a time.
LOOKED_AT_ONCE, LOOK_SHARE = 1024, 8
# Bytes of a non-zero in a minibatch, in each of the types and orders that it has on its way.
_PER_NONZERO = 40
# Values of a hidden unit: before and after each of norm, activation and dropout, and their gradients.
_PER_UNIT, _PER_UNIT_LOOKED_AT = 12, 4
# Values of a gene in a cell, for each head, where likelihood and heads are not one op; where they are, the
# kernel has a block of cells at a time.
_PER_GENE, _PER_GENE_LOOKED_AT, _FUSED_BLOCK = 4, 3, 48 << 20
# Of the stream of validation, and of a cell in splits and orders.
_ORDERED_STREAM, _PER_CELL = 8 << 20, 16
# Compiled kernels, pools of threads, what malloc keeps.
_OTHER = 96 << 20


@dataclass(frozen=True, slots=True)
class StepShape:
    """What the memory of training follows from, but for the minibatch.

    Args:
        n_vars: number of genes.
        nonzeros: mean non-zero counts a cell.
        weights: bytes of weights and statistics.
        trained: bytes of the weights that have a gradient.
        units: hidden units of all layers.
        heads: layers as wide as the genes.
        is_fused: whether these and the likelihood are one op, which makes no cells x genes.
        rows: times that each cell is decoded.
        copies: further copies of the weights: averaged, best.
        rounded: bytes of weights that are rounded to bfloat16 for products.
        stream: bytes of blocks on their way.
        looked_at: cells kept for validation.
        processes: that share each minibatch.
    """

    n_vars: int
    nonzeros: float
    weights: int
    trained: int
    units: int
    heads: int
    is_fused: bool
    rows: int
    copies: int
    rounded: int
    stream: int
    looked_at: int
    processes: int = 1


@dataclass(frozen=True, slots=True)
class Estimate:
    """Bytes that training takes at its highest, apart from what Python and torch took before.

    Args:
        weights: weights, gradients, optimiser, averaged and best weights.
        minibatch: a minibatch, and what its layers keep.
        stream: blocks of counts on their way.
    """

    weights: int
    minibatch: int
    stream: int

    @property
    def total(self) -> int:
        """All of them, and compiled code."""
        return self.weights + self.minibatch + self.stream + _OTHER

    @property
    def on_device(self) -> int:
        """Without what stays in the host's memory where a GPU computes."""
        return self.weights + self.minibatch

    @property
    def short(self) -> str:
        """The total for people."""
        return f"about {_mb(self.total)}"

    def __str__(self) -> str:
        return (
            f"{self.short}: weights and optimiser {_mb(self.weights)}, minibatch "
            f"{_mb(self.minibatch)}, stream {_mb(self.stream)}, compiled code {_mb(_OTHER)}"
        )


def shape_of(
    module: nn.Module,
    atlas: Atlas,
    plan: TrainingPlan,
    *,
    looked_at: int,
    keeps_best: bool,
    memory_budget: int | str | None,
) -> StepShape:
    """The shape of training a module on some cells.

    A module says by ``fuses_heads`` that its layers as wide as the genes are one op with the likelihood, and
    by ``rows_per_cell`` that it decodes each cell several times.

    Args:
        module: to be trained; what is frozen has ``requires_grad`` off.
        atlas: the cells, with the genes that the module sees; a few hundred cells are read.
        plan: says what copies of the weights there are.
        looked_at: cells kept for validation.
        keeps_best: whether the best weights are one.
        memory_budget: of the stream.
    """
    linear = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
    heads = [layer for layer in linear if layer.out_features >= atlas.n_vars]
    widths = [layer.out_features for layer in linear if layer.out_features < atlas.n_vars]
    widths += [layer.weight.shape[1] for layer in module.modules() if isinstance(layer, InputLinear)]
    is_averaged = plan.averaging is not None
    is_rounded = plan.matmul_dtype == "bfloat16"
    # What is read takes about as much again while it is put in order; validation has a stream of its own.
    blocks = min(as_budget(memory_budget), int(2 * atlas.n_obs * atlas.bytes_per_row))
    return StepShape(
        atlas.n_vars, atlas.nonzeros_per_row,
        weights=sum(value.nbytes for value in module.state_dict().values()),
        trained=sum(p.nbytes for p in module.parameters() if p.requires_grad),
        units=sum(widths), heads=len(heads), is_fused=bool(getattr(module, "fuses_heads", False)),
        rows=int(getattr(module, "rows_per_cell", 1)),
        # While validation is looked at, there are the averaged weights and those that they stand in for.
        copies=2 * is_averaged + keeps_best,
        rounded=sum(layer.weight.nbytes for layer in heads) // 2 if is_rounded else 0,
        stream=blocks + _ORDERED_STREAM + _PER_CELL * atlas.n_obs, looked_at=looked_at,
        processes=ranks.world_size(),
    )  # fmt: skip


def estimate(shape: StepShape, batch_size: int) -> Estimate:
    """Bytes of training with minibatches of so many cells.

    Example:
        >>> shape = StepShape(10_000, 500.0, 16 << 20, 16 << 20, 400, 2, True, 1, 3, 0, 64 << 20, 0)
        >>> found = estimate(shape, 128)
        >>> found.weights >> 20, found.minibatch < estimate(shape, 1024).minibatch
        (112, True)
    """
    state = (1 + shape.copies) * shape.weights + 3 * shape.trained + shape.rounded
    mine = -(-batch_size // shape.processes)
    step = _bytes_of_rows(shape, mine, _PER_UNIT, _PER_GENE)
    looked_at = min(looks_at_once(batch_size), shape.looked_at)
    look = _bytes_of_rows(shape, looked_at, _PER_UNIT_LOOKED_AT, _PER_GENE_LOOKED_AT)
    return Estimate(state, max(step, look), shape.stream)


def looks_at_once(batch_size: int) -> int:
    """Cells at a time of a look at validation."""
    return min(LOOKED_AT_ONCE, LOOK_SHARE * batch_size)


def _bytes_of_rows(shape: StepShape, n_obs: int, per_unit: int, per_gene: int) -> int:
    rows = n_obs * shape.rows
    wide = 4 * rows * shape.heads * shape.n_vars
    wide = min(wide, _FUSED_BLOCK) if shape.is_fused else wide * per_gene
    return int(rows * (_PER_NONZERO * shape.nonzeros + 4 * per_unit * shape.units)) + wide


def choose_batch_size(asked: int | str, shape: StepShape, there_is: int | None, *, on_device: bool) -> int:
    """The minibatch to train with: the one asked for if it fits, or with ``"auto"`` the largest that does.

    ``"auto"`` is the default of 128 where that fits, else the largest power of two that does, at least 16:
    of larger ones there are fewer steps, which is what training is short of.

    Args:
        asked: cells, or ``"auto"``.
        shape: of the training.
        there_is: bytes that are free; ``None`` where nobody knows: then everything fits.
        on_device: whether these are a GPU's.

    Raises:
        OptionError: it does not fit; names the estimate and the size that would.
    """

    def fits(size: int) -> bool:
        found = estimate(shape, size)
        return there_is is None or (found.on_device if on_device else found.total) <= there_is

    first = DEFAULT_BATCH_SIZE if asked == "auto" else int(asked)
    if fits(first):
        return first
    smaller = next((size for size in _POWERS if size < first and fits(size)), None)
    if asked == "auto" and smaller is not None:
        return smaller
    remedy = (
        f"batch_size={smaller} would fit"
        if smaller is not None
        else f"nor would {_POWERS[-1]} fit: lower memory_budget, n_hidden or the number of genes"
    )
    raise OptionError(
        f"batch_size={asked!r}: training would take {estimate(shape, first)}; {_mb(there_is or 0)} are free; "
        f"{remedy}"
    )


def batch_size_that_fits(asked: int | str, shape: StepShape, device: torch.device) -> tuple[int, Estimate]:
    """`choose_batch_size` beside what is free now, the first process's choice; and the estimate, logged.

    Raises:
        OptionError: it does not fit.
    """
    there_is = free_bytes(device)
    size = ranks.of_first(choose_batch_size(asked, shape, there_is, on_device=device.type == "cuda"))
    found = estimate(shape, size)
    logger.info(
        "training with minibatches of %d cells takes %s; %s", size, found,
        "what is free is not known" if there_is is None else f"{_mb(there_is)} are free",
    )  # fmt: skip
    return size, found


def free_bytes(device: torch.device) -> int | None:
    """Bytes that training on a device may take: a GPU's, or this process's share of the machine's memory."""
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    free = available_bytes()
    return None if free is None else free // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def room_for_counts(device: torch.device, takes: Estimate) -> Room | None:
    """Where counts may stay on a GPU: half of what training leaves, as a `Room` needs twice its bytes.

    ``None`` on a CPU, where ``memory_budget`` says what may stay.
    """
    if device.type == "cpu":
        return None
    return Room(device, max(0, (free_bytes(device) or 0) - takes.on_device) // 2)


def _mb(n_bytes: int) -> str:
    return f"{n_bytes / 1e6:,.0f} MB" if n_bytes < 1e10 else f"{n_bytes / 1e9:,.1f} GB"
