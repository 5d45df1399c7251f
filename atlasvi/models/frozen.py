"""What of a model is not trained: plain values that are saved with it, and put into force while it trains."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from atlasvi.nn.layers import InputLinear
from atlasvi.nn.ranks import BatchNorm


@dataclass(frozen=True, slots=True)
class Freeze:
    """What of a reference is not trained on a query; names and defaults are scvi-tools'.

    Args:
        n_batch: batches that the reference knows; rows of weight of those after them are new.
        batchnorm_encoder: scales, shifts and running moments of the encoder's batch norms.
        batchnorm_decoder: those of the decoder's.
        classifier: the classifier of `SCANVI`.
        everything_else: all weights but the rows of new batches.
    """

    n_batch: int = 0
    batchnorm_encoder: bool = True
    batchnorm_decoder: bool = False
    classifier: bool = True
    everything_else: bool = True

    @property
    def keeps_latents(self) -> bool:
        """Whether cells of the reference's batches stay where they are: all that encodes them is frozen."""
        return self.everything_else and self.batchnorm_encoder


@contextmanager
def frozen(module: Any, freeze: Freeze | None) -> Iterator[None]:
    """Inside, training leaves what is frozen as it is."""
    with _undone(module) as handles:
        if freeze is not None:
            _freeze(module, freeze, handles)
        yield


@contextmanager
def posterior_only(module: Any) -> Iterator[None]:
    """Inside, training changes the networks of the posterior alone, whose names are ``posterior_parts``.

    Nothing drops out and batch norms use their running moments, so that what is minimised is the negative
    ELBO that `get_elbo` gives.
    """
    with _undone(module) as handles:
        for name, part in module.named_children():
            part.requires_grad_(name in module.posterior_parts)
        for name, parameter in module.named_parameters(recurse=False):
            parameter.requires_grad_(name in module.posterior_parts)
        for part in module.modules():
            if isinstance(part, BatchNorm):
                part.is_frozen = True
            elif part is not module:
                handles.append(part.register_forward_pre_hook(_as_outside_of_training))
        yield


@contextmanager
def _undone(module: nn.Module) -> Iterator[list[Any]]:
    """Afterwards, weights can be trained as before, and the hooks in the list are gone."""
    before = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    handles: list[Any] = []
    try:
        yield handles
    finally:
        for handle in handles:
            handle.remove()
        for part in module.modules():
            if isinstance(part, BatchNorm):
                part.is_frozen = False
        for parameter, requires_grad in before:
            parameter.requires_grad_(requires_grad)


def _freeze(module: Any, freeze: Freeze, handles: list[Any]) -> None:
    n_batch = freeze.n_batch
    for name, part in module.named_modules():
        if isinstance(part, BatchNorm):
            is_decoder = name.split(".")[0] in ("decoder", "u_decoder")
            is_frozen = freeze.batchnorm_decoder if is_decoder else freeze.batchnorm_encoder
            # Its running moments in training too, or the frozen layers behind it would see others.
            part.is_frozen = is_frozen
            part.requires_grad_(not is_frozen)
        elif freeze.everything_else:
            for parameter in part.parameters(recurse=False):
                parameter.requires_grad_(False)
    if hasattr(module, "classifier"):
        module.classifier.requires_grad_(not freeze.classifier)
    if not freeze.everything_else:
        return
    for part in module.modules():
        if (
            isinstance(part, InputLinear)
            and part.n_sees_batch > n_batch
            and part.covariate_weight is not None
        ):
            part.covariate_weight.requires_grad_(True)
            first = part.n_continuous
            only = _only_rows(first + n_batch, first + part.n_sees_batch)
            handles.append(part.covariate_weight.register_hook(only))
    if module.config.dispersion == "gene-batch" and hasattr(module, "log_theta"):
        module.log_theta.requires_grad_(True)
        handles.append(module.log_theta.register_hook(_only_rows(n_batch, len(module.log_theta))))


def _as_outside_of_training(part: nn.Module, _: Any) -> None:
    part.eval()


def _only_rows(start: int, stop: int) -> Callable[[torch.Tensor], torch.Tensor]:
    def hook(gradient: torch.Tensor) -> torch.Tensor:
        kept = torch.zeros_like(gradient)
        kept[start:stop] = gradient[start:stop]
        return kept

    return hook
