"""Posterior-only refinement: the encoder fitted anew to some cells, all that is generative left as it is.

The ELBO of cells that training never saw is low for two reasons: the decoder does not know them, and the
encoder, which was fitted to other cells, gives poor posteriors for them (the amortisation gap of Cremer et
al. 2018). Lopez et al. 2018 therefore refit the encoder before they compare held-out likelihoods of models.
It stays a bound on the same log p(x), since p is the same.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from atlasvi.errors import OptionError
from atlasvi.models.arguments import at_least_one, checked_seed
from atlasvi.models.frozen import posterior_only
from atlasvi.models.scvi import SCVIConfig
from atlasvi.nn import ranks
from atlasvi.progress import bar
from atlasvi.store.atlas import Atlas
from atlasvi.store.fields import Codes
from atlasvi.stream import Epochs
from atlasvi.train.fit import Listeners, fit
from atlasvi.train.schedule import EarlyStopping, TrainingPlan, steps_between_checks
from atlasvi.types import HasPosterior

# The weights are near a good place already: a third of the rate of training, the whole KL, no decay.
PLAN = TrainingPlan(
    lr=0.01, eps=0.01, weight_decay=0.0, n_epochs_kl_warmup=None, n_steps_lr_warmup=40, averaging=0.97,
    n_steps_per_check=25, patience=8,
)  # fmt: skip
MOST_LOOKED_AT, LOOK_AT_ONCE = 4096, 1024


def refined(
    model: Any,
    atlas: Atlas,
    codes: Codes,
    cells: NDArray[np.int64],
    *,
    max_epochs: int,
    batch_size: int,
    plan_kwargs: Mapping[str, Any] | None,
    device: torch.device,
    seed: int,
    num_workers: int | None,
    memory_budget: int | str | None,
    shown: bool,
) -> Any:
    """A copy of ``model`` whose posterior is refitted to ``cells``, positions in ``atlas``.

    The weights kept are those of the best look at (up to 4,096 of) these cells, of which the first is before
    any step: their ELBO does not fall.

    Raises:
        OptionError: the model has no posterior to refit, or an argument that cannot be.
    """
    if not isinstance(model.module, HasPosterior) or not model.module.posterior_parts:
        raise OptionError(
            f"{type(model).__name__} has no posterior to refit, or, as with prior='vamp', one that the prior "
            "is made of; SCVI and its family have, with prior='normal' or 'mog'"
        )
    max_epochs, batch_size = at_least_one("max_epochs", max_epochs), at_least_one("batch_size", batch_size)
    seed = checked_seed(seed)
    plan = PLAN.with_options(plan_kwargs)
    other = copy.copy(model)
    module: Any = copy.deepcopy(model.module)
    other.module = module
    other._forget_latents()
    rank, world_size = ranks.rank(), ranks.world_size()
    stream: dict[str, Any] = {"num_workers": num_workers, "memory_budget": memory_budget}
    training = Epochs(
        atlas, codes, batch_size=batch_size, positions=cells, seed=seed, rank=rank, world_size=world_size,
        **stream,
    )  # fmt: skip
    looked_at = cells[:: -(-len(cells) // MOST_LOOKED_AT)]
    looks = Epochs(
        atlas, codes, batch_size=LOOK_AT_ONCE, positions=looked_at[rank::world_size], shuffle=False, **stream
    )
    between = steps_between_checks(plan, len(looked_at), batch_size)
    patience = (plan.patience or 0) * (between or 0)
    has_penalties = isinstance(model.config, SCVIConfig)
    if has_penalties:  # which are no part of the ELBO
        module.config = replace(model.config, adversary=0.0, mmd=0.0)
    total = max_epochs * len(cells)
    with bar("refine", total, "cells", enabled=shown and rank == 0) as advance, posterior_only(module):

        def after_step(epoch: int, seen: int, elbo: float) -> None:
            advance(epoch * len(cells) + min(seen * world_size, len(cells)), f"-ELBO {elbo:,.1f}")

        progress = fit(
            module, training, looks, plan,
            max_epochs=max_epochs, seed=seed, device=device,
            early_stopping=EarlyStopping(patience=patience, in_steps=True),
            validate_every=max_epochs, steps_between_checks=between, look_first=True,
            listeners=Listeners(step=after_step),
        )  # fmt: skip
    if has_penalties:
        module.config = model.config
    other.checks = progress.checks
    options = {"n_obs": len(cells), "plan": asdict(plan), "batch_size": batch_size, "seed": seed}
    other._training = {**(model._training or {}), "kept_step": None, "refined": options}
    return other


__all__ = ["refined"]
