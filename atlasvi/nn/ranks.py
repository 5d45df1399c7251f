"""Sums over the processes that train one model together (``torchrun``); of one process, nothing happens."""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from atlasvi_kernels import norm_relu_dropout

from atlasvi.errors import OptionError, TrainingError


def join(device: torch.device) -> None:
    """Meet the other processes that ``torchrun`` started, if it did and they have not met yet.

    Raises:
        OptionError: torch was built without them.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or (dist.is_available() and dist.is_initialized()):
        return
    if not dist.is_available():
        raise OptionError("WORLD_SIZE is above 1 but this torch has no torch.distributed; run one process")
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    # Counts and decisions are summed on the CPU, gradients where they are.
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    # Its threads must have ended when Python is left: one that then wants Python's lock aborts the process.
    atexit.register(_leave)


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this one, from 0, which is the one that writes."""
    return dist.get_rank() if world_size() > 1 else 0


def wait_for_all() -> None:
    """Return when every process has come here."""
    if world_size() > 1:
        dist.barrier()


def summed(value: torch.Tensor) -> torch.Tensor:
    """The sum over processes, differentiable: the gradient is summed over processes likewise."""
    if world_size() == 1:
        return value
    total: torch.Tensor = _Sum.apply(value)
    return total


class _Sum(torch.autograd.Function):
    """`summed`: every process adds to the loss what depends on the sum, so gradients are summed likewise."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor) -> torch.Tensor:
        total = value.contiguous().clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> torch.Tensor:
        return _Sum.forward(ctx, upstream[0])


def sum_in_place(tensors: Sequence[torch.Tensor]) -> None:
    """Replace each tensor by its sum over processes, all in one message."""
    if world_size() == 1 or not tensors:
        return
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    dist.all_reduce(flat)
    for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


def agreed(flag: bool) -> bool:
    """What the first process thinks."""
    return bool(of_first(int(flag)))


@contextmanager
def naming_the_lost(where_to_go_on: Callable[[], str]) -> Iterator[None]:
    """Inside, that another process has gone is a `TrainingError` that says where to go on."""
    try:
        yield
    except RuntimeError as error:
        is_of_messages = isinstance(error, dist.DistError) or "gloo" in str(error)
        if world_size() == 1 or not is_of_messages:
            raise
        said = str(error).split(". ")[0]
        raise TrainingError(
            f"process {rank()} of {world_size()} has lost another one ({said}); "
            f"{where_to_go_on()}. Start all of them again with resume=True"
        ) from error


def of_first(number: int) -> int:
    """The number that the first process has."""
    if world_size() == 1:
        return number
    value = torch.tensor(number if rank() == 0 else 0)
    sum_in_place([value])
    return int(value)


class BatchNorm(torch.nn.BatchNorm1d):
    """Batch norm over the cells of all processes (torch's own for several processes has no CPU path).

    With ``is_frozen`` set, ``train()`` leaves it as it is outside of training.
    """

    is_frozen = False

    def train(self, mode: bool = True) -> BatchNorm:
        """As of any module, unless it is frozen."""
        return super().train(mode and not self.is_frozen)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(B, n)``; of one process, or outside of training, torch's."""
        if not self.training or world_size() == 1:
            found: torch.Tensor = super().forward(x)
            return found
        n = summed(x.new_tensor(float(len(x))))
        mean = summed(x.sum(0)) / n
        variance = summed((x - mean).square().sum(0)) / n
        self.take_up(mean, variance, n)
        return (x - mean) * torch.rsqrt(variance + self.eps) * self.weight + self.bias

    def is_fused(self, x: torch.Tensor) -> bool:
        """Whether there is one op for the norm by these rows' moments, and what follows it."""
        here = x.device.type == "cpu" and x.dtype == self.weight.dtype == torch.float32
        return here and self.training and world_size() == 1

    def relu_dropout(self, x: torch.Tensor, kept: torch.Tensor | None, rate: float) -> torch.Tensor:
        """``(B, n)`` of the norm, ReLU and dropout of rows in training, where `is_fused`."""
        y: torch.Tensor
        y, mean, variance = norm_relu_dropout(x, self.weight, self.bias, kept=kept, rate=rate, eps=self.eps)
        self.take_up(mean, variance, len(x))
        return y

    @torch.no_grad()
    def take_up(self, mean: torch.Tensor, variance: torch.Tensor, n: torch.Tensor | int) -> None:
        """Bring the running moments nearer to those of n rows; ``variance`` is divided by n."""
        assert self.running_mean is not None and self.running_var is not None
        assert self.momentum is not None and self.num_batches_tracked is not None
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(variance * (n / (n - 1)), self.momentum)
        self.num_batches_tracked += 1

    def by_own_moments(self, x: torch.Tensor) -> torch.Tensor:
        """``(B, n)`` by the moments of these rows alone, which the running moments do not take up."""
        found: torch.Tensor = torch.nn.functional.batch_norm(
            x, None, None, self.weight, self.bias, training=True, eps=self.eps
        )
        return found
