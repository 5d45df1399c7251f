"""What a training run does when: rates, KL warm-up, early stopping, number of epochs."""

from __future__ import annotations

import difflib
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch

from atlasvi.errors import OptionError
from atlasvi.train.average import decay_at


@dataclass(frozen=True, slots=True)
class TrainingPlan:
    """How the weights are changed. Names and defaults are those of scvi-tools' ``plan_kwargs``.

    Args:
        optimizer: ``"Adam"`` or ``"AdamW"``.
        lr: learning rate.
        weight_decay: L2 penalty, as the optimiser means it.
        eps: epsilon of Adam.
        n_steps_kl_warmup: steps over which the KL weight rises, if ``n_epochs_kl_warmup`` is ``None``.
        n_epochs_kl_warmup: epochs over which the KL weight rises.
        min_kl_weight: where it starts.
        max_kl_weight: where it ends.
        reduce_lr_on_plateau: multiply the rate by ``lr_factor`` when ``lr_scheduler_metric`` stalls.
        lr_factor: see there.
        lr_patience: epochs without gain before that.
        lr_threshold: gain that counts.
        lr_min: the rate does not fall below it.
        lr_scheduler_metric: ``"elbo_validation"``, ``"reconstruction_loss_validation"`` or
            ``"kl_local_validation"``.
        n_steps_lr_warmup: steps over which the rate rises to ``lr``.
        averaging: decay, a step, of the average of the weights that is looked at and kept; ``None``: the
            weights themselves.
        n_steps_per_check: least steps from one look at the cells kept for validation to the next within an
            epoch; ``None``: they are looked at after epochs only.
        start_at_means: whether the decoder's bias starts at the genes' mean shares of the counts.
        patience: times ``n_steps_per_check`` without gain after which training ends by itself; ``None``: it
            does not.
        batch_norm_momentum: how fast the statistics that batch norm has outside of training follow.
        matmul_dtype: ``"float32"`` or ``"bfloat16"``, what the factors of the large products are rounded to;
            weights and sums are float32.
    """

    optimizer: str = "Adam"
    lr: float = 1e-3
    weight_decay: float = 1e-6
    eps: float = 0.01
    n_steps_kl_warmup: int | None = None
    n_epochs_kl_warmup: int | None = 400
    min_kl_weight: float = 0.0
    max_kl_weight: float = 1.0
    reduce_lr_on_plateau: bool = False
    lr_factor: float = 0.6
    lr_patience: int = 30
    lr_threshold: float = 0.0
    lr_min: float = 0.0
    lr_scheduler_metric: str = "elbo_validation"
    n_steps_lr_warmup: int = 0
    averaging: float | None = None
    n_steps_per_check: int | None = None
    start_at_means: bool = False
    patience: int | None = None
    batch_norm_momentum: float = 0.01
    matmul_dtype: str = "float32"

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        if self.optimizer not in ("Adam", "AdamW"):
            raise OptionError(f"optimizer {self.optimizer!r} is not supported; use 'Adam' or 'AdamW'")
        for name, (least, most, says) in _RANGES.items():
            value = getattr(self, name)
            if value is None and name in _MAY_BE_NONE:
                continue
            if not isinstance(value, int | float | np.number) or not least <= float(value) <= most:
                raise OptionError(f"{name} must be {says}, is {value!r}")
        if self.matmul_dtype not in ("float32", "bfloat16"):
            raise OptionError(f"matmul_dtype {self.matmul_dtype!r}: use 'float32' or 'bfloat16'")
        if self.min_kl_weight > self.max_kl_weight:
            raise OptionError(
                f"min_kl_weight {self.min_kl_weight} is above max_kl_weight {self.max_kl_weight}"
            )
        metrics = ("elbo_validation", "reconstruction_loss_validation", "kl_local_validation")
        if self.lr_scheduler_metric not in metrics:
            raise OptionError(
                f"lr_scheduler_metric {self.lr_scheduler_metric!r} is not one of {', '.join(metrics)}"
            )

    def with_options(self, plan_kwargs: Mapping[str, Any] | None) -> TrainingPlan:
        """This plan with some values changed.

        Raises:
            OptionError: an option that there is not, naming the nearest one.
        """
        known = [field.name for field in fields(self)]
        for name in plan_kwargs or {}:
            if name not in known:
                near = difflib.get_close_matches(name, known, 1)
                hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}"
                raise OptionError(f"plan_kwargs[{name!r}] is not supported; {hint}")
        return replace(self, **(plan_kwargs or {}))

    def kl_weight(self, epoch: int, step: int) -> float:
        """Weight of KL(q(z|x) || p(z)) at a step: linear from ``min_kl_weight`` to ``max_kl_weight``."""
        if self.n_epochs_kl_warmup:
            share = epoch / self.n_epochs_kl_warmup
        elif self.n_steps_kl_warmup:
            share = step / self.n_steps_kl_warmup
        else:
            share = 1.0
        return self.min_kl_weight + min(share, 1.0) * (self.max_kl_weight - self.min_kl_weight)

    def lr_at(self, step: int) -> float:
        """Learning rate of a step of the warm-up: linear up to ``lr``."""
        return self.lr * min(1.0, (step + 1) / max(self.n_steps_lr_warmup, 1))

    def make_optimizer(self, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        """The optimiser, in its fused form."""
        kind = torch.optim.Adam if self.optimizer == "Adam" else torch.optim.AdamW
        return kind(parameters, lr=self.lr, eps=self.eps, weight_decay=self.weight_decay, fused=True)

    def make_scheduler(
        self, optimizer: torch.optim.Optimizer
    ) -> torch.optim.lr_scheduler.ReduceLROnPlateau | None:
        """What lowers the rate, if anything does."""
        if not self.reduce_lr_on_plateau:
            return None
        return torch.optim.lr_scheduler.ReduceLROnPlateau(
            optimizer,
            factor=self.lr_factor,
            patience=self.lr_patience,
            threshold=self.lr_threshold,
            threshold_mode="abs",
            min_lr=self.lr_min,
        )


_ABOVE_0, _BELOW_1, _MOST = math.nextafter(0, 1), math.nextafter(1, 0), sys.float_info.max
_RANGES = {
    "lr": (_ABOVE_0, _MOST, "a number > 0"),
    "averaging": (0, _BELOW_1, "in [0, 1)"),
    "lr_factor": (0, _BELOW_1, "in [0, 1)"),
    "batch_norm_momentum": (0, 1, "in [0, 1]"),
    "n_steps_per_check": (1, _MOST, "at least 1"),
    **dict.fromkeys(
        ("weight_decay", "eps", "n_steps_kl_warmup", "n_epochs_kl_warmup", "min_kl_weight", "max_kl_weight",
         "lr_patience", "lr_threshold", "lr_min", "n_steps_lr_warmup", "patience"),
        (0, _MOST, "a number of at least 0"),
    ),
}  # fmt: skip
_MAY_BE_NONE = {"averaging", "n_steps_per_check", "n_steps_kl_warmup", "n_epochs_kl_warmup", "patience"}

# By name, as `train` takes them. What the numbers of the first come from is in docs/training.md.
PLANS = {
    "adaptive": TrainingPlan(
        lr=0.01, eps=0.01, n_steps_lr_warmup=40, n_epochs_kl_warmup=None, averaging=0.999,
        n_steps_per_check=25, start_at_means=True, patience=8, batch_norm_momentum=0.1,
    ),
    "scvi-tools": TrainingPlan(),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class EarlyStopping:
    """Stop when ``monitor`` has not fallen by ``min_delta`` for ``patience`` epochs, or steps.

    Args:
        monitor: a column of the history; lower is better.
        patience: epochs, or steps.
        min_delta: nats a cell.
        in_steps: whether ``patience`` is in steps.
        averaging: decay of the average of the weights that are looked at. A bad stretch of steps stays in
            it for its length, 1 / (1 - decay): of ``patience`` in steps it is twice that at least.
    """

    monitor: str = "elbo_validation"
    patience: int = 45
    min_delta: float = 0.0
    in_steps: bool = False
    averaging: float | None = None

    def says_stop(self, values: list[float], steps: list[int] | None = None) -> bool:
        """Whether to stop after these values, the latest last, and taken after so many epochs, or steps."""
        best, best_at, now = float("inf"), 0, 0
        for i, value in enumerate(values):
            now = i + 1 if steps is None else steps[i]
            if value < best - self.min_delta:
                best, best_at = value, now
        patience = float(self.patience)
        if self.in_steps and self.averaging is not None:
            patience = max(patience, 2 / (1 - decay_at(self.averaging, now)))
        return now > best_at and now - best_at >= patience


def adapted(plan: TrainingPlan, n_obs: int, batch_size: int) -> TrainingPlan:
    """The plan with a KL warm-up of four epochs, 200 to 1,000 steps, where it watches and has none itself.

    Without one, dimensions of the latent are given up before they are used, and cell types with them; a
    longer one than a small data set takes to be learnt costs held-out ELBO.
    """
    if plan.n_steps_per_check is None or plan.n_epochs_kl_warmup or plan.n_steps_kl_warmup:
        return plan
    return replace(plan, n_steps_kl_warmup=min(1_000, max(200, 4 * n_obs // batch_size)))


def steps_between_checks(plan: TrainingPlan, n_validation: int, batch_size: int) -> int | None:
    """Steps from one look at validation to the next: so many that looking takes a tenth of the time at most.

    A cell that is looked at costs a third of one that is trained on.
    """
    if plan.n_steps_per_check is None or not n_validation:
        return None
    return max(plan.n_steps_per_check, -(-4 * n_validation // batch_size))


def default_epochs(n_obs: int) -> int:
    """scvi-tools' rule: 400 epochs up to 20,000 cells, then as many as see 8 million cells.

    Example:
        >>> default_epochs(3_000), default_epochs(1_000_000)
        (400, 8)
    """
    return max(1, min(round(20_000 / n_obs * 400), 400))
