"""The only training loop. Nothing else changes weights."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from atlasvi.errors import TrainingError
from atlasvi.nn import ranks
from atlasvi.train.average import Averaged, floating_state, set_state
from atlasvi.train.checkpoint import Progress, claim, load_checkpoint, save_checkpoint
from atlasvi.train.history import LOOKED_AT, Check, EpochRecord, TermSums
from atlasvi.train.schedule import EarlyStopping, TrainingPlan
from atlasvi.types import LossTerms, Minibatch, Noise, StepWeights, Trains

# Validation draws its noise from a seed of its own, the same at each look: looks compare like with like.
VALIDATION_SEED = 1 << 40
# Steps from one look at the loss to the next on a GPU, where looking waits for it.
_STEPS_UNSEEN = 50


class Training(Protocol):
    """The minibatches of an epoch in its order, from one of them on: `stream.Epochs`."""

    def __call__(self, epoch: int, start: int) -> Iterator[Minibatch]:
        """Minibatches ``start``, ``start + 1``, ..."""
        ...


@dataclass(frozen=True, slots=True)
class Checkpoints:
    """Where and how often a run is written.

    Args:
        path: the folder that holds the last one.
        every_seconds: least time between two; 0 writes after each epoch.
        resume: go on from the one there is.
        run: options that a resumed run must share with the one that wrote it.
    """

    path: Path
    every_seconds: float
    resume: bool
    run: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Listeners:
    """Who is told how it goes.

    Args:
        start: called once, when nothing can refuse the run any more, with what was done of it before.
        step: called after each step with ``(epoch, cells so far in the epoch, mean negative ELBO so far)``.
        epoch: called after each epoch with its record.
        check: called after each look at the cells kept for validation.
    """

    start: Callable[[Progress], None] | None = None
    step: Callable[[int, int, float], None] | None = None
    epoch: Callable[[EpochRecord], None] | None = None
    check: Callable[[Check], None] | None = None


@dataclass
class Run:
    """What `fit` works on.

    Args:
        module: satisfies `types.Trains`.
        plan: optimiser, rates, KL warm-up.
        seed: of the noise.
        device: where to compute.
        checkpoints: where to write the run.
        progress: how far it has come.
    """

    module: Any
    plan: TrainingPlan
    seed: int
    device: torch.device
    checkpoints: Checkpoints | None
    progress: Progress = field(default_factory=Progress)

    def __post_init__(self) -> None:
        self.parameters = list(self.module.parameters())
        self.optimizer = self.plan.make_optimizer(self.parameters)
        self.scheduler = self.plan.make_scheduler(self.optimizer)
        averaging = self.plan.averaging
        self.average = None if averaging is None else Averaged(self.module, averaging)
        self.best: dict[str, torch.Tensor] = {}
        self.begun = time.perf_counter()
        for layer in self.module.modules():
            if isinstance(layer, torch.nn.BatchNorm1d):
                layer.momentum = self.plan.batch_norm_momentum

    @property
    def elapsed(self) -> float:
        """Seconds of the run, those before it was resumed included."""
        return self.progress.earlier + time.perf_counter() - self.begun

    def step(self, minibatch: Minibatch) -> LossTerms:
        """Change the weights once."""
        plan, at = self.plan, self.progress
        if at.step <= plan.n_steps_lr_warmup:
            for group in self.optimizer.param_groups:
                group["lr"] = plan.lr_at(at.step)
        weights = StepWeights(plan.kl_weight(at.epoch, at.step), getattr(torch, plan.matmul_dtype))
        terms: LossTerms = self.module.loss(minibatch, Noise(self.seed, at.step, minibatch.rows), weights)
        if self.device.type == "cpu" or at.step % _STEPS_UNSEEN == 0:
            self.loss_must_be_finite(terms.total, minibatch)
        for parameter in self.parameters:
            parameter.grad = None
        self.backward(terms.total, len(minibatch))
        self.optimizer.step()
        at.step += 1
        at.minibatch += 1
        at.sums.add(terms)
        if self.average is not None:
            self.average.update(at.step)
        return terms

    def backward(self, loss: torch.Tensor, n_obs: int) -> None:
        """Gradients of the mean over the cells of all processes; ``loss`` is over those of this one."""
        if ranks.world_size() > 1:
            n = torch.tensor(float(n_obs), device=self.device)
            ranks.sum_in_place([n])
            # Of no cells the mean is no number, and it has no gradient.
            loss = loss.nan_to_num(0.0) if n_obs == 0 else loss * (n_obs / n)
        loss.backward()
        if ranks.world_size() > 1:
            parameters = [p for p in self.parameters if p.requires_grad]
            for parameter in parameters:
                parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            ranks.sum_in_place([p.grad for p in parameters if p.grad is not None])

    def check(self, validation: Iterator[Minibatch]) -> Check:
        """Look at the cells kept apart, with the weights that would be kept now."""
        if self.average is None:
            found = evaluate(self.module, validation, seed=self.seed, device=self.device)
        else:
            with self.average.applied():
                found = evaluate(self.module, validation, seed=self.seed, device=self.device)
        self.module.train()
        at = self.progress
        loss, elbo, reconstruction, kl = found.means()
        at.checks.append(Check(at.step, self.elapsed, elbo, reconstruction, kl, loss))
        return at.checks[-1]

    def keep_best(self, monitor: str) -> None:
        """Keep the weights of the last look if no look before was better."""
        values, _ = self.progress.monitored(monitor)
        if values[-1] <= min(values):
            self.progress.kept_step = self.progress.step
            state = floating_state(self.module) if self.average is None else self.average.values
            if self.best:  # in their own memory, not in that of a second copy
                for name, value in state.items():
                    self.best[name].copy_(value)
            else:
                self.best = {name: value.clone() for name, value in state.items()}

    def finish(self) -> None:
        """Put in the weights to keep: the best, if they were looked for, or the averaged."""
        if self.best:
            set_state(self.module, self.best)
        elif self.average is not None:
            set_state(self.module, self.average.values)
        self.module.eval()

    @contextmanager
    def saving_the_best(self) -> Iterator[None]:
        """When training goes wrong inside, the weights of the best look, if there are any, are put back."""
        try:
            yield
        except TrainingError:
            if self.best:
                self.finish()
            raise

    def save(self) -> None:
        """Write a checkpoint, of several processes once."""
        assert self.checkpoints is not None
        sums = TermSums(self.progress.sums.values.tolist()).over_all_ranks()
        if ranks.rank():
            return
        save_checkpoint(
            self.checkpoints.path, self.module, self.optimizer, self.scheduler,
            replace(self.progress, earlier=self.elapsed, sums=sums),
            {} if self.average is None else self.average.values, self.best, self.checkpoints.run,
        )  # fmt: skip

    def load(self) -> None:
        """Go on from a checkpoint."""
        assert self.checkpoints is not None
        self.progress, average, self.best = load_checkpoint(
            self.checkpoints.path, self.module, self.optimizer, self.scheduler, self.checkpoints.run
        )
        if self.average is not None:
            self.average.values = average
        if ranks.rank():  # the sums so far are of all processes: one of them goes on from there
            self.progress.sums = TermSums()

    def loss_must_be_finite(self, loss: torch.Tensor, minibatch: Minibatch) -> None:
        """Raise `TrainingError`, which names step, cells and the last checkpoint, if it is not."""
        if len(minibatch) and not math.isfinite(loss.item()):
            raise self.error(f"loss became {loss.item()}", self.progress.step, minibatch)

    def weights_must_be_finite(self, minibatch: Minibatch) -> None:
        """A finite loss can have a gradient that is not: such weights must not become a checkpoint."""
        if not all(bool(torch.isfinite(parameter).all()) for parameter in self.parameters):
            raise self.error("weights became NaN or infinite", self.progress.step - 1, minibatch)

    def last_checkpoint(self) -> str:
        """Where to go on from, for an error."""
        if self.checkpoints is None:
            return "no checkpoint was asked for"
        if not (self.checkpoints.path / "state.json").is_file():
            return "no checkpoint was written yet"
        return f"the last good checkpoint is {str(self.checkpoints.path)!r}"

    def error(self, what: str, step: int, minibatch: Minibatch) -> TrainingError:
        """What happened, where, and where to go on from."""
        rows = minibatch.rows.tolist()
        shown = ", ".join(map(str, rows[:8])) + (f", ... ({len(rows)} in all)" if len(rows) > 8 else "")
        return TrainingError(
            f"the {what} at step {step} (epoch {self.progress.epoch}), in the minibatch of rows {shown}; "
            f"{self.last_checkpoint()}. Lower lr (plan_kwargs={{'lr': ...}}) or look at those cells"
        )


def fit(
    module: torch.nn.Module,
    training: Training,
    validation: Callable[[], Iterator[Minibatch]] | None,
    plan: TrainingPlan,
    *,
    max_epochs: int,
    seed: int,
    device: torch.device,
    early_stopping: EarlyStopping | None = None,
    validate_every: int = 1,
    steps_between_checks: int | None = None,
    look_first: bool = False,
    checkpoints: Checkpoints | None = None,
    listeners: Listeners | None = None,
) -> Progress:
    """Minimise the module's loss over epochs of minibatches.

    Args:
        module: satisfies `types.Trains`.
        training: ``(epoch, start) -> minibatches``, in the order of that epoch.
        validation: minibatches kept from training, or ``None``.
        plan: optimiser, rates, KL warm-up.
        max_epochs: number of epochs in all, those before a resumption included.
        seed: of the noise (dropout, reparameterisation), which is keyed by (seed, step, cell).
        device: where to compute.
        early_stopping: when to stop before ``max_epochs``.
        validate_every: epochs from one look at validation to the next.
        steps_between_checks: further looks within an epoch.
        look_first: a look before the first step too, so that the weights there were can be the best.
        checkpoints: where to write the run, and whether to go on from there.
        listeners: who is told how it goes.

    Returns:
        How far it came: a record of each epoch, and each look at the cells kept for validation.

    Raises:
        TrainingError: the loss is no longer finite; names the step, the cells and the last checkpoint.
    """
    assert isinstance(module, Trains)
    listeners = listeners or Listeners()
    module.to(device)
    if checkpoints is not None and ranks.rank() == 0:
        claim(checkpoints.path, resume=checkpoints.resume)
    ranks.wait_for_all()
    run = Run(module, plan, seed, device, checkpoints)
    if checkpoints is not None and checkpoints.resume:
        run.load()
    if listeners.start is not None:
        listeners.start(run.progress)
    at = run.progress
    written = time.perf_counter()
    looks = steps_between_checks if validation is not None else None
    restores = early_stopping is not None and early_stopping.in_steps
    best_by = "elbo_validation"
    if early_stopping is not None and early_stopping.monitor in LOOKED_AT:
        best_by = early_stopping.monitor

    def look() -> None:
        assert validation is not None
        found = run.check(validation())
        if restores:
            run.keep_best(best_by)
        if listeners.check is not None:
            listeners.check(found)

    def is_over() -> bool:
        if early_stopping is None:
            return False
        name, in_steps = early_stopping.monitor, early_stopping.in_steps
        return early_stopping.says_stop(*at.monitored(name, in_steps=in_steps))

    def save() -> None:
        nonlocal written
        run.save()
        written = time.perf_counter()

    with run.saving_the_best(), ranks.naming_the_lost(run.last_checkpoint):
        if look_first and at.step == 0:
            look()
        while at.epoch < max_epochs and not is_over():
            started = time.perf_counter()
            last: Minibatch | None = None
            module.train()
            for minibatch in training(at.epoch, at.minibatch):
                last = minibatch.to(device)
                run.step(last)
                if listeners.step is not None and (device.type == "cpu" or at.step % _STEPS_UNSEEN == 0):
                    listeners.step(at.epoch, at.sums.n, at.sums.means()[1])
                if looks and at.step % looks == 0:
                    look()
                    if is_over():
                        break
                # Several processes ask the first one, which takes a message.
                if checkpoints is not None and (ranks.world_size() == 1 or at.step % _STEPS_UNSEEN == 0):
                    if ranks.agreed(0 < checkpoints.every_seconds < time.perf_counter() - written):
                        run.weights_must_be_finite(last)
                        at.seconds += time.perf_counter() - started
                        started = time.perf_counter()
                        save()
            if last is not None:
                run.weights_must_be_finite(last)
            at.seconds += time.perf_counter() - started
            is_last = at.epoch + 1 == max_epochs
            is_due = (at.epoch + 1) % validate_every == 0
            if validation is not None and (is_due or is_last) and not at.has_looked:
                look()
            at.sums = at.sums.over_all_ranks()
            record = at.close_epoch(plan, run.optimizer.param_groups[0]["lr"])
            metric = getattr(record, plan.lr_scheduler_metric)
            if run.scheduler is not None and metric is not None:
                run.scheduler.step(metric)
            # A log that is ahead of the checkpoint is mended when its epochs come again; one behind is not.
            if listeners.epoch is not None:
                listeners.epoch(record)
            if checkpoints is not None:
                if ranks.agreed(is_last or time.perf_counter() - written >= checkpoints.every_seconds):
                    save()
    run.finish()
    return at


@torch.no_grad()
def evaluate(
    module: torch.nn.Module, minibatches: Iterator[Minibatch], *, seed: int, device: torch.device
) -> TermSums:
    """Sums of the loss terms without training, at full KL weight, one draw of z a cell.

    The noise depends on the seed and the cell alone, so two calls agree, however the cells are cut.
    """
    assert isinstance(module, Trains)
    module.eval()
    sums = TermSums()
    for minibatch in minibatches:
        minibatch = minibatch.to(device)
        sums.add(module.loss(minibatch, Noise(seed + VALIDATION_SEED, 0, minibatch.rows), StepWeights()))
    return sums.over_all_ranks()
