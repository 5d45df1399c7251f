"""The only training loop. Nothing else changes weights."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from atlasvi.errors import TrainingError
from atlasvi.train.checkpoint import claim, load_checkpoint, save_checkpoint
from atlasvi.train.history import EpochRecord, TermSums
from atlasvi.train.schedule import EarlyStopping, TrainingPlan
from atlasvi.types import Minibatch, Noise, StepWeights, Trains

# Validation draws its noise from a seed of its own, the same at each epoch: epochs compare like with like.
VALIDATION_SEED = 1 << 40


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
        step: called after each step with ``(epoch, cells so far in the epoch, mean negative ELBO so far)``.
        epoch: called after each epoch with its record.
    """

    step: Callable[[int, int, float], None] | None = None
    epoch: Callable[[EpochRecord], None] | None = None


def fit(
    module: torch.nn.Module,
    training: Callable[[int], Iterator[Minibatch]],
    validation: Callable[[], Iterator[Minibatch]] | None,
    plan: TrainingPlan,
    *,
    max_epochs: int,
    seed: int,
    device: torch.device,
    early_stopping: EarlyStopping | None = None,
    validate_every: int = 1,
    checkpoints: Checkpoints | None = None,
    listeners: Listeners | None = None,
) -> list[EpochRecord]:
    """Minimise the module's loss over epochs of minibatches.

    Args:
        module: satisfies `types.Trains`.
        training: ``epoch -> minibatches``, in the order of that epoch.
        validation: minibatches kept from training, or ``None``.
        plan: optimiser, rates, KL warm-up.
        max_epochs: number of epochs in all, those before a resumption included.
        seed: of the noise (dropout, reparameterisation), which is keyed by (seed, step, cell).
        device: where to compute.
        early_stopping: when to stop before ``max_epochs``.
        validate_every: epochs from one validation to the next.
        checkpoints: where to write the run, and whether to go on from there.
        listeners: who is told how it goes.

    Returns:
        A record of each epoch.

    Raises:
        TrainingError: the loss is no longer finite; names the step, the cells and the last checkpoint.
    """
    assert isinstance(module, Trains)
    listeners = listeners or Listeners()
    module.to(device)
    optimizer = plan.make_optimizer(list(module.parameters()))
    scheduler = plan.make_scheduler(optimizer)
    records: list[EpochRecord] = []
    step = 0
    if checkpoints is not None:
        claim(checkpoints.path, resume=checkpoints.resume)
    if checkpoints is not None and checkpoints.resume:
        records, step = load_checkpoint(checkpoints.path, module, optimizer, scheduler, checkpoints.run)
    written = time.monotonic()

    for epoch in range(len(records), max_epochs):
        if early_stopping is not None and early_stopping.says_stop(_monitored(records, early_stopping)):
            break
        started = time.perf_counter()
        sums = TermSums()
        kl_weight = 0.0
        last: Minibatch | None = None
        module.train()
        for minibatch in training(epoch):
            minibatch = minibatch.to(device)
            kl_weight = plan.kl_weight(epoch, step)
            terms = module.loss(minibatch, Noise(seed, step, minibatch.rows), StepWeights(kl=kl_weight))
            if not bool(torch.isfinite(terms.total)):
                raise TrainingError(
                    _not_finite(f"loss became {terms.total.item()}", epoch, step, minibatch, checkpoints)
                )
            optimizer.zero_grad(set_to_none=True)
            terms.total.backward()
            optimizer.step()
            step += 1
            sums.add(terms)
            last = minibatch
            if listeners.step is not None:
                listeners.step(epoch, sums.n, sums.elbo / sums.n)
        # A finite loss can have a gradient that is not: such weights must not become a checkpoint.
        if last is not None and not all(bool(torch.isfinite(p).all()) for p in module.parameters()):
            raise TrainingError(
                _not_finite("weights became NaN or infinite", epoch, step - 1, last, checkpoints)
            )
        seconds = time.perf_counter() - started

        held_out: tuple[float | None, float | None, float | None] = (None, None, None)
        if validation is not None and ((epoch + 1) % validate_every == 0 or epoch + 1 == max_epochs):
            held_out = evaluate(module, validation(), seed=seed, device=device).means()[1:]
        loss, elbo, reconstruction, kl = sums.means()
        record = EpochRecord(
            epoch, loss, elbo, reconstruction, kl, *held_out,
            kl_weight, optimizer.param_groups[0]["lr"], seconds, sums.n / max(seconds, 1e-9),
        )  # fmt: skip
        records.append(record)
        if scheduler is not None and getattr(record, plan.lr_scheduler_metric) is not None:
            scheduler.step(getattr(record, plan.lr_scheduler_metric))
        # A log that is ahead of the checkpoint is mended when its epochs come again; one behind is not.
        if listeners.epoch is not None:
            listeners.epoch(record)
        if checkpoints is not None and (
            time.monotonic() - written >= checkpoints.every_seconds or epoch + 1 == max_epochs
        ):
            save_checkpoint(checkpoints.path, module, optimizer, scheduler, records, step, checkpoints.run)
            written = time.monotonic()
    module.eval()
    return records


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
    return sums


def _monitored(records: list[EpochRecord], early_stopping: EarlyStopping) -> list[float]:
    values = [getattr(record, early_stopping.monitor) for record in records]
    return [value for value in values if value is not None]


def _not_finite(
    what: str, epoch: int, step: int, minibatch: Minibatch, checkpoints: Checkpoints | None
) -> str:
    rows = minibatch.rows.tolist()
    shown = ", ".join(map(str, rows[:8])) + (f", ... ({len(rows)} in all)" if len(rows) > 8 else "")
    last = "no checkpoint was asked for"
    if checkpoints is not None:
        there = (checkpoints.path / "state.json").is_file()
        last = (
            f"the last good checkpoint is {str(checkpoints.path)!r}"
            if there
            else "no checkpoint was written yet"
        )
    return (
        f"the {what} at step {step} (epoch {epoch}), in the minibatch of rows {shown}; {last}. "
        "Lower lr (plan_kwargs={'lr': ...}) or look at those cells"
    )
