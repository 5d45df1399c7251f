"""What every model shares: it is made (`core`), trained (here) and asked (`answers`)."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atlasvi.errors import OptionError, TrainingError
from atlasvi.models.answers import Answers
from atlasvi.models.arguments import (
    at_least_one,
    cell_positions,
    checked_seed,
    choose_device,
    not_negative,
    one_of,
    refuse,
)
from atlasvi.models.core import Config, Module
from atlasvi.models.data import Data, gene_shares, split_cells, split_options
from atlasvi.models.folder import not_finite
from atlasvi.models.frozen import frozen
from atlasvi.nn import ranks
from atlasvi.progress import bar
from atlasvi.store.identity import look, look_at_codes
from atlasvi.stream import Epochs
from atlasvi.train.checkpoint import Progress, batch_size_of
from atlasvi.train.estimate import (
    DEFAULT_BATCH_SIZE,
    batch_size_that_fits,
    looks_at_once,
    room_for_counts,
    shape_of,
)
from atlasvi.train.fit import Checkpoints, Listeners, fit
from atlasvi.train.history import LOOKED_AT, Check, EpochRecord
from atlasvi.train.schedule import (
    PLANS,
    EarlyStopping,
    TrainingPlan,
    adapted,
    default_epochs,
    steps_between_checks,
)
from atlasvi.types import Starts

# Cells that the genes' shares are taken from where the decoder starts at them.
START_CELLS = 4096
# Cells kept for validation that a schedule which looks at them every few steps looks at.
MOST_LOOKED_AT = 4096
# By the names that Lightning and people use.
PRECISIONS = {
    "float32": "float32", "32-true": "float32", "32": "float32", "bf16": "bfloat16", "bf16-mixed": "bfloat16",
}  # fmt: skip


class CountModel(Answers[Config, Module]):
    """Base of the models. A subclass names its config and module, and has a constructor of its own.

    Args:
        adata: the data it will be trained on, set up.
        config: of the subclass.
        needs_library: whether the module wants the library sizes' moments.
    """

    # What training is stopped by, and the best weights are told by.
    _monitor = "elbo_validation"

    def train(
        self,
        max_epochs: int | None = None,
        accelerator: str = "auto",
        devices: int | str = "auto",
        train_size: float | None = 0.9,
        validation_size: float | None = None,
        shuffle_set_split: bool = True,
        batch_size: int | str = DEFAULT_BATCH_SIZE,
        early_stopping: bool | None = None,
        plan_kwargs: Mapping[str, Any] | None = None,
        *,
        schedule: str | None = None,
        precision: str = "float32",
        early_stopping_monitor: str | None = None,
        early_stopping_patience: int | None = None,
        early_stopping_min_delta: float = 0.0,
        check_val_every_n_epoch: int = 1,
        enable_progress_bar: bool = True,
        seed: int = 0,
        num_workers: int | None = None,
        memory_budget: int | str | None = None,
        checkpoint: str | Path | None = None,
        checkpoint_every_seconds: float = 60.0,
        resume: bool = False,
        on_epoch: Any = None,
        on_check: Any = None,
        **unsupported: object,
    ) -> None:
        """Fit the model by minibatches streamed from where the counts are.

        Args:
            max_epochs: most passes over the cells; scvi-tools' rule when ``None`` (400 up to 20,000 cells,
                then as many as see 8 million cells), of which the adaptive schedule takes few.
            accelerator: ``"auto"``, ``"cpu"`` or ``"gpu"``.
            devices: ``"auto"`` or 1.
            train_size: share of the cells to train on; 0.9 when ``None``, as in scvi-tools.
            validation_size: share kept for validation; the rest when ``None``.
            shuffle_set_split: choose them at random, or take the first ones.
            batch_size: cells a minibatch. A number that does not fit the memory there is is refused before
                the run; ``"auto"`` takes the default if it fits, or the largest power of two that does.
            early_stopping: stop when the monitored value no longer falls; ``None``: as the schedule has it,
                where cells are kept for validation.
            plan_kwargs: options of `TrainingPlan`: ``lr``, ``n_epochs_kl_warmup``, ...
            schedule: ``"adaptive"``, which looks at the cells kept for validation every few steps, stops when
                they no longer gain and keeps the best weights, or ``"scvi-tools"``; ``None``: that of
                ``model.plan``, adaptive unless the model has its own, as `SCVI.paper`.
            precision: ``"float32"``, or ``"bf16"``: the factors of the large matrix products are rounded to
                bfloat16, while weights, sums and likelihood stay float32.
            early_stopping_monitor: a column of ``history``, lower is better; ``None``: ``"elbo_validation"``,
                of `SCANVI` ``"validation_loss"``, in which labels count.
            early_stopping_patience: epochs without gain; as the schedule has it when ``None``.
            early_stopping_min_delta: nats.
            check_val_every_n_epoch: epochs from one validation to the next.
            enable_progress_bar: show one on standard error.
            seed: of split, order and noise: the same seed gives the same weights.
            num_workers: threads that read; ``None``: cores less one, up to 4.
            memory_budget: bytes, or ``"500MB"``, that blocks and minibatches may take; 256 MiB when ``None``.
                Counts that fit into half of it stay in memory after the first epoch; on a GPU those that fit
                into half of what training leaves free stay there.
            checkpoint: folder to write the run to as it goes.
            checkpoint_every_seconds: least time between two checkpoints; 0 for each epoch.
            resume: go on from ``checkpoint``, to the same weights as if it had never stopped.
            on_epoch: called with each `EpochRecord`; a `train.TensorBoard`, or any function.
            on_check: called with each `Check`, a look at the cells kept for validation; likewise.
            **unsupported: arguments of scvi-tools that there are not here are refused by name.

        Raises:
            OptionError: an argument that is wrong or not supported.
            TrainingError: the loss is no longer finite.
        """
        refuse("train", unsupported)
        seed = checked_seed(seed)
        at_least_one("check_val_every_n_epoch", check_val_every_n_epoch)
        not_negative("checkpoint_every_seconds", checkpoint_every_seconds)
        atlas, codes = self._data(None)
        plan = self._plan(schedule, precision).with_options(plan_kwargs)
        max_epochs = self._default_epochs(atlas.n_obs, plan) if max_epochs is None else max_epochs
        max_epochs = at_least_one("max_epochs", max_epochs)
        if batch_size != "auto" and (not isinstance(batch_size, int | np.integer) or batch_size < 3):
            raise OptionError(f"batch_size must be a whole number of 3 or more, or 'auto', is {batch_size!r}")
        device = choose_device(accelerator, devices)
        ranks.join(device)
        if resume and checkpoint is None:
            raise OptionError("resume=True needs checkpoint=, the folder of the run to go on with")
        of_training = (f"{term}_train" for term in ("elbo", "reconstruction_loss", "kl_local"))
        monitor = self._monitor if early_stopping_monitor is None else early_stopping_monitor
        one_of("early_stopping_monitor", monitor, [*LOOKED_AT, *of_training])
        split = split_options(atlas.n_obs, train_size, validation_size, shuffle_set_split, seed)
        training, held_out, _ = split_cells(**split)
        if early_stopping and monitor in LOOKED_AT and not len(held_out):
            raise OptionError("early_stopping needs cells kept for validation: train_size below 1")
        if early_stopping_patience is not None and early_stopping_patience < 0:
            raise OptionError(f"early_stopping_patience must be 0 or more, is {early_stopping_patience}")
        if early_stopping is None:
            early_stopping = plan.patience is not None and len(held_out) > 0
        if plan.n_steps_per_check is not None and len(held_out) > MOST_LOOKED_AT:
            held_out = held_out[:: -(-len(held_out) // MOST_LOOKED_AT)]
        if batch_size == "auto" and resume and checkpoint is not None:
            batch_size = batch_size_of(Path(checkpoint)) or batch_size
        with frozen(self.module, self._freeze):
            shape = shape_of(
                self.module, atlas[:, codes.gene_columns], plan, looked_at=len(held_out),
                memory_budget=memory_budget,
                keeps_best=early_stopping and early_stopping_patience is None and plan.patience is not None,
            )  # fmt: skip
            if not any(parameter.requires_grad for parameter in self.module.parameters()):
                raise OptionError(
                    "there is nothing to train: the query has no new batch and all else is frozen. Ask the "
                    "model as it is, or map the query with unfrozen=True"
                )
        batch_size, takes = batch_size_that_fits(batch_size, shape, device)
        plan = adapted(plan, len(training), batch_size)
        between = steps_between_checks(plan, len(held_out), batch_size)
        in_steps = early_stopping_patience is None and plan.patience is not None and between is not None
        patience = (plan.patience or 0) * (between or 0) if in_steps else early_stopping_patience
        patience = 45 if patience is None else patience
        if plan.reduce_lr_on_plateau and not len(held_out):
            raise OptionError("reduce_lr_on_plateau needs cells kept for validation: train_size below 1")
        room = room_for_counts(device, takes)
        epochs = partial(
            Epochs, atlas, codes, batch_size=batch_size, seed=seed, num_workers=num_workers,
            memory_budget=memory_budget, room=room, rank=ranks.rank(), world_size=ranks.world_size(),
        )  # fmt: skip
        minibatches = self._training_epochs(epochs, training)
        validation = Epochs(
            atlas, codes, batch_size=looks_at_once(batch_size), shuffle=False,
            positions=held_out[ranks.rank() :: ranks.world_size()],
            num_workers=num_workers, memory_budget=memory_budget, room=room,
        )  # fmt: skip

        run = {
            "config": asdict(self.config),  # type: ignore[call-overload]
            "fields": json.loads(self.fields.to_json()),
            "plan": asdict(plan),
            "split": split,
            "cells": look(atlas[:, codes.gene_columns]),
            "codes": None if checkpoint is None else look_at_codes(codes),
            "freeze": None if self._freeze is None else asdict(self._freeze),
            "batch_size": batch_size,
            # The order of the cells, and when the rate falls, follow from these.
            "memory_budget": memory_budget,
            "check_val_every_n_epoch": check_val_every_n_epoch,
        }
        if plan.start_at_means and not resume and self._starts_afresh and isinstance(self.module, Starts):
            some = islice(minibatches(0), max(1, START_CELLS // batch_size))
            self.module.start_at(gene_shares(some, self.fields.n_vars))
        label = f"train, {takes.short}{minibatches.kept and f', counts kept {minibatches.kept}'}"
        shown = enable_progress_bar and ranks.rank() == 0
        with (
            bar(label, max_epochs * len(training), "cells", enabled=shown, at_most=early_stopping) as advance,
            frozen(self.module, self._freeze),
        ):
            origin = self.origin
            stay = self._freeze is not None and self._freeze.keeps_latents

            under_way, done = Progress(), 0

            def at_start(progress: Progress) -> None:
                nonlocal under_way, done
                under_way, done = progress, progress.epoch * len(training)
                # What is refused before leaves the model as it was.
                if not stay:
                    self._forget_latents()
                if self.is_trained and origin is None:
                    self.origin = "trained before"  # until an epoch of this run has ended
                self._split, self._looks_like = split, run["cells"]
                self._training = {key: run[key] for key in ("plan", "batch_size", "memory_budget")}
                self.records, self.checks = list(progress.records), list(progress.checks)

            def after_step(epoch: int, cells: int, elbo: float) -> None:
                nonlocal done
                done = epoch * len(training) + min(cells * ranks.world_size(), len(training))
                advance(done, f"epoch {epoch + 1}/{max_epochs}  {self.loss_name} {elbo:,.1f}")

            def after_epoch(record: EpochRecord) -> None:
                # Kept as they come: a run that is interrupted in a notebook leaves a model to look at.
                self.records.append(record)
                if on_epoch is not None and ranks.rank() == 0:
                    on_epoch(record)

            def after_check(check: Check) -> None:
                self.checks.append(check)
                if on_check is not None and ranks.rank() == 0:
                    on_check(check)

            try:
                progress = fit(
                    self.module,
                    minibatches,
                    validation if len(held_out) else None,
                    plan,
                    max_epochs=max_epochs,
                    seed=seed,
                    device=device,
                    early_stopping=EarlyStopping(
                        monitor, patience, early_stopping_min_delta, in_steps, plan.averaging
                    )
                    if early_stopping
                    else None,
                    validate_every=check_val_every_n_epoch,
                    steps_between_checks=between,
                    checkpoints=None
                    if checkpoint is None
                    else Checkpoints(Path(checkpoint), checkpoint_every_seconds, resume, run),
                    listeners=Listeners(at_start, after_step, after_epoch, after_check),
                )
            except TrainingError as error:
                if not_finite(self.module):  # nothing to answer with
                    self.records, self.checks, self.origin = [], [], None
                if not (in_steps and self.checks):
                    raise
                if not self.is_trained:
                    self.origin = "stopped in its first epoch"
                assert self._training is not None
                self._training["kept_step"] = under_way.kept_step
                raise TrainingError(f"{error}; the model has the weights of the best look") from error
            self.records, self.checks, self.origin = progress.records, progress.checks, origin
            assert self._training is not None
            self._training["kept_step"] = progress.kept_step
            if (kept := self._kept_look) is not None:
                elbo = f"{self.loss_name} {kept.elbo_validation:,.1f} on held-out cells"
                advance(done, f"{progress.epoch} epochs, kept step {kept.step:,}: {elbo}")
        if not stay:
            self._learn_latents()

    def refine_posterior(
        self,
        adata: Data | None = None,
        indices: Sequence[int] | None = None,
        max_epochs: int | None = None,
        accelerator: str = "auto",
        devices: int | str = "auto",
        batch_size: int = 128,
        plan_kwargs: Mapping[str, Any] | None = None,
        *,
        enable_progress_bar: bool = True,
        seed: int = 0,
        num_workers: int | None = None,
        memory_budget: int | str | None = None,
    ) -> Any:
        """A copy of the model whose encoders were fitted anew to some cells; the decoder stays bit for bit.

        How held-out cells are compared in Lopez et al. 2018: what an encoder fitted to other cells loses on
        them is not the model's fault. q(z|x), and q(l|x) where there is one, are trained until the ELBO of
        these cells no longer gains, the best weights are kept, and the ELBO stays a bound on the same log
        p(x). Cells are streamed as in `train`; this model is not changed.

        Args:
            adata: other data; that of the model when ``None``. It need not have been set up.
            indices: positions of the cells, such as ``model.validation_indices``; all when ``None``.
            max_epochs: most passes over these cells; scvi-tools' rule for training when ``None``.
            accelerator: ``"auto"``, ``"cpu"`` or ``"gpu"``.
            devices: ``"auto"`` or 1.
            batch_size: cells a minibatch.
            plan_kwargs: options of `TrainingPlan` that differ from those of refinement, such as ``lr``.
            enable_progress_bar: show one on standard error.
            seed: of order and noise.
            num_workers: threads that read.
            memory_budget: as in `train`.

        Returns:
            A model of the same class. Its ``validation_history`` has each look at these cells, the first from
            before any step.

        Raises:
            NotTrainedError: before training.
            OptionError: the model has no posterior to refit, or an argument that cannot be.

        Example:
            >>> held_out = model.validation_indices
            >>> refined = model.refine_posterior(indices=held_out, max_epochs=5, enable_progress_bar=False)
            >>> refined.get_marginal_ll(indices=held_out, n_mc_samples=20) < 0
            True
        """
        from atlasvi.models.refine import refined

        self._must_be_trained()
        atlas, codes = self._data(adata)
        cells = np.arange(atlas.n_obs) if indices is None else cell_positions(indices, atlas.n_obs)
        device = choose_device(accelerator, devices)
        ranks.join(device)
        return refined(
            self, atlas, codes, cells,
            max_epochs=default_epochs(len(cells)) if max_epochs is None else max_epochs,
            batch_size=batch_size, plan_kwargs=plan_kwargs, device=device, seed=seed,
            num_workers=num_workers, memory_budget=memory_budget, shown=enable_progress_bar,
        )  # fmt: skip

    def _plan(self, schedule: str | None, precision: str) -> TrainingPlan:
        if schedule is not None:
            one_of("schedule", schedule, tuple(PLANS))
        one_of("precision", precision, tuple(PRECISIONS))
        plan = self.plan if schedule is None else PLANS[schedule]
        return replace(plan, matmul_dtype=PRECISIONS[precision])

    def _forget_latents(self) -> None:
        """Training is to move them: what a model knows of where its cells lie does not hold any more."""

    def _learn_latents(self) -> None:
        """Training has moved them: what a model is to know of where its cells lie."""

    def _training_epochs(self, epochs: Callable[..., Epochs], training: NDArray[np.integer]) -> Any:
        """Epochs of the cells to train on, with whatever a model wants beside them."""
        return epochs(positions=training)

    def _default_epochs(self, n_obs: int, plan: TrainingPlan) -> int:
        return default_epochs(n_obs)

    @property
    def _starts_afresh(self) -> bool:
        """Whether no weight was learnt yet: what was is not to be set to the genes' shares."""
        return not self.is_trained


__all__ = ["CountModel"]
