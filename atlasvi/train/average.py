"""Weights averaged over steps, and the best there were."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

# Steps from one update to the next, once there were some: it reads and writes all weights, as Adam does.
EVERY, AT_FIRST = 8, 64


def decay_at(decay: float, step: int) -> float:
    """Of one step, after so many: the first steps are soon forgotten."""
    return min(decay, (1 + step) / (10 + step))


def floating_state(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Weights and batch-norm statistics, not copied; without what a module names as ``aside``."""
    aside = getattr(module, "aside", ())
    state = module.state_dict().items()
    return {name: value for name, value in state if value.is_floating_point() and name not in aside}


class Averaged:
    """An exponential moving average of the weights and of the statistics of batch norm.

    ``average += (1 - d) (weights - average)`` with ``d = min(decay, (1 + t) / (10 + t))`` after t steps, so
    that the first steps are soon forgotten (Polyak and Juditsky 1992; the ramp is TensorFlow's).

    Args:
        module: whose weights.
        decay: of one step, in [0, 1).
    """

    def __init__(self, module: torch.nn.Module, decay: float) -> None:
        self.module, self.decay = module, decay
        self.values = {name: value.clone() for name, value in floating_state(module).items()}

    def update(self, step: int) -> None:
        """Take the weights after ``step`` steps into account."""
        steps = 1 if step <= AT_FIRST else EVERY
        if step % steps:
            return
        decay = decay_at(self.decay, step) ** steps
        now = floating_state(self.module)
        torch._foreach_lerp_(list(self.values.values()), [now[name] for name in self.values], 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the module has the averaged weights."""
        mine = {name: value.clone() for name, value in floating_state(self.module).items()}
        set_state(self.module, self.values)
        try:
            yield
        finally:
            set_state(self.module, mine)


@torch.no_grad()
def set_state(module: torch.nn.Module, values: dict[str, torch.Tensor]) -> None:
    """Copy values into the weights and statistics of these names."""
    state = floating_state(module)
    for name, value in values.items():
        state[name].copy_(value)
