"""Weights in the terms of scvi-tools: which of its parameters is which of ours, and how each is laid out.

A linear layer of scvi-tools has ``(n_out, n_in + covariates)``, with one column a level after the inputs;
ours has a row for each input, and the covariates' rows apart. The rest has the same shapes under other names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from atlasvi.models.scanvi import SCANVIModule
from atlasvi.nn.decoder import LinearDecoder, LinearHead
from atlasvi.nn.encoder import Encoder
from atlasvi.nn.layers import MLP, InputLinear

Parts = Iterator[tuple[nn.Module, str]]


def weights_from(theirs: Mapping[str, torch.Tensor], module: Any) -> dict[str, torch.Tensor]:
    """The state of one of our modules, from that of the scvi-tools module it corresponds to.

    Args:
        theirs: its ``state_dict``.
        module: ours: of `SCVI`, `SCANVI` or `LinearSCVI`, of the same sizes.

    Raises:
        KeyError: a parameter that theirs lacks.
    """
    path_of = {part: path for path, part in module.named_modules()}
    ours: dict[str, torch.Tensor] = {}
    for part, name in _parts(module):
        if isinstance(part, InputLinear):
            weight, n_in = theirs[f"{name}.weight"], len(part.weight)
            ours[f"{path_of[part]}.weight"] = weight[:, :n_in].T.contiguous()
            ours[f"{path_of[part]}.bias"] = theirs[f"{name}.bias"]
            if part.covariate_weight is not None:
                ours[f"{path_of[part]}.covariate_weight"] = weight[:, n_in:].T.contiguous()
        else:
            ours |= {f"{path_of[part]}.{key}": theirs[f"{name}.{key}"] for key in part.state_dict()}
    if hasattr(module, "log_theta"):
        px_r = theirs["px_r"]
        ours["log_theta"] = px_r.reshape(len(px_r), -1).T.contiguous()
    if isinstance(module, SCANVIModule):
        ours["label_prior"] = theirs["y_prior"][0]
    if module.library_is_latent:
        ours["library_log_mean"] = theirs["library_log_means"][0]
        ours["library_log_var"] = theirs["library_log_vars"][0]
    return ours


def _parts(module: Any) -> Parts:
    """Each layer that has parameters, and the name of its counterpart."""
    yield from _encoder(module.encoder, "z_encoder")
    if module.library_is_latent:
        yield from _encoder(module.library_encoder, "l_encoder")
    if isinstance(module, SCANVIModule):
        classifier, n_before = module.classifier, 0
        if classifier.mlp is not None:
            yield from _mlp(classifier.mlp, "classifier.classifier.0")
            n_before = 1
        yield classifier.out, f"classifier.classifier.{n_before}"
        yield from _encoder(module.u_encoder, "encoder_z2_z1")
        yield from _encoder(module.u_decoder, "decoder_z1_z2", "decoder")
    decoder = module.decoder
    if isinstance(decoder, LinearDecoder):
        yield from _head(decoder.scale, "decoder.factor_regressor")
        if decoder.pi is not None:
            yield from _head(decoder.pi, "decoder.px_dropout_decoder")
        return
    yield from _mlp(decoder.mlp, "decoder.px_decoder")
    yield decoder.scale, "decoder.px_scale_decoder.0"
    if decoder.pi is not None:
        yield decoder.pi, "decoder.px_dropout_decoder"
    if decoder.log_theta is not None:
        yield decoder.log_theta, "decoder.px_r_decoder"


def _encoder(encoder: Encoder, theirs: str, kind: str = "encoder") -> Parts:
    yield from _mlp(encoder.mlp, f"{theirs}.{kind}")
    yield encoder.loc, f"{theirs}.mean_{kind}"
    yield encoder.log_variance, f"{theirs}.var_{kind}"


def _mlp(mlp: MLP, theirs: str) -> Parts:
    for i, linear in enumerate(mlp.linears):
        yield linear, f"{theirs}.fc_layers.Layer {i}.0"
    for i, norm in enumerate(mlp.batch_norms):
        yield norm, f"{theirs}.fc_layers.Layer {i}.1"


def _head(head: LinearHead, theirs: str) -> Parts:
    yield head.linear, f"{theirs}.fc_layers.Layer 0.0"
    if head.norm is not None:
        yield head.norm, f"{theirs}.fc_layers.Layer 0.1"


__all__ = ["weights_from"]
