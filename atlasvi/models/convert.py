"""Models of scvi-tools, read and written: SCVI, SCANVI and LinearSCVI in, SCVI out.

A saved folder of scvi-tools is one pickle with weights, names and options. It is read by `models.pickled`,
which runs nothing of it. Which of its parameters is which of ours, and how each is laid out, is said here
once for both ways.
A linear layer of scvi-tools has ``(n_out, n_in + covariates)``, with one column a level after the inputs;
ours has a row for each input, and the covariates' rows apart. The rest has the same shapes under other names.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from atlasvi.errors import ModelError, OptionError
from atlasvi.files import replacing_folder
from atlasvi.models.data import LibraryMoments
from atlasvi.models.ldvae import LinearSCVI, LinearSCVIConfig
from atlasvi.models.pickled import read_pickled
from atlasvi.models.scanvi import SCANVI, SCANVIConfig, SCANVIModule
from atlasvi.models.scvi import SCVI, SCVIConfig, SCVIModule
from atlasvi.nn.decoder import LinearDecoder, LinearHead
from atlasvi.nn.encoder import Encoder
from atlasvi.nn.layers import MLP, InputLinear
from atlasvi.store.fields import are_numbers, as_level
from atlasvi.types import FieldMap

if TYPE_CHECKING:
    from atlasvi.models.data import Data

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


def weights_to(module: Any, like: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The inverse of `weights_from`: the state of the scvi-tools module that corresponds to ours.

    Args:
        module: of `SCVI`.
        like: what scvi-tools' module has besides, such as the encoder of a library size that is observed.
    """
    theirs = dict(like)
    for part, name in _parts(module):
        if isinstance(part, InputLinear):
            weight: torch.Tensor = part.weight
            if part.covariate_weight is not None:
                weight = torch.cat([weight, part.covariate_weight])
            theirs[f"{name}.weight"] = weight.T.contiguous()
            theirs[f"{name}.bias"] = part.bias
        else:
            theirs |= {f"{name}.{key}": value for key, value in part.state_dict().items()}
    if hasattr(module, "log_theta"):
        log_theta = module.log_theta
        theirs["px_r"] = log_theta[0] if module.config.dispersion == "gene" else log_theta.T.contiguous()
    if module.library_is_latent:
        theirs["library_log_means"] = module.library_log_mean.unsqueeze(0)
        theirs["library_log_vars"] = module.library_log_var.unsqueeze(0)
    return {name: value.detach().cpu().clone() for name, value in theirs.items()}


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


# --- folders --------------------------------------------------------------------------------------

_FILE = "model.pt"
_KINDS: dict[str, Any] = {
    "SCVI": (SCVI, SCVIConfig),
    "SCANVI": (SCANVI, SCANVIConfig),
    "LinearSCVI": (LinearSCVI, LinearSCVIConfig),
}
# Options of scvi-tools that say nothing where they are at these values.
_SILENT = {
    "registry": None, "datamodule": None, "log_variational": True, "batch_representation": "one-hot",
    "use_size_factor_key": False, "extra_payload_autotune": False, "y_prior": None, "labels_groups": None,
    "use_labels_groups": False,
}  # fmt: skip


def from_scvi_tools(path: str | Path, adata: Data | None = None) -> Any:
    """A model of scvi-tools that its ``save`` wrote, as ours: the same latents and the same expression.

    Args:
        path: the folder, or the file in it: ``model.pt``, after its ``prefix`` if it was saved with one.
        adata: data to go with it; methods can also be given data later.

    Raises:
        ModelError: there is no model, it asks for objects that a model has no use for (nothing of it is run),
            or it has options that ours has not, by name.

    Example:
        >>> to_scvi_tools(model, "theirs")
        >>> from_scvi_tools("theirs").is_trained
        True
    """
    file = _file_in(Path(path))
    content = read_pickled(file)
    try:
        attributes, state = content["attr_dict"], content["model_state_dict"]
        registry = attributes["registry_"]
        name, version = registry["model_name"], registry["scvi_version"]
        if not attributes["is_trained_"]:
            raise OptionError("it was saved before it was trained")
        if name not in _KINDS:
            raise OptionError(f"it is a {name}; {', '.join(_KINDS)} can be converted")
        kind, config_type = _KINDS[name]
        config = config_type(**_options(name, attributes["init_params_"]))
        model = kind.without_data(config, _fields(content["var_names"], registry))
        model.module.load_state_dict(weights_from(state, model.module))
    except (KeyError, TypeError, AttributeError, IndexError, ValueError, RuntimeError) as error:
        raise ModelError(f"{str(file)!r} is not a model that can be converted: {error}") from error
    model.origin = f"trained by scvi-tools {version}"
    if adata is not None:
        model.atlas, model._codes = model._data(adata)
    return model


def _file_in(path: Path) -> Path:
    """The one file of a folder that ends as scvi-tools' do; before that comes what ``prefix=`` was."""
    found = [path] if path.is_file() else sorted(path.glob(f"*{_FILE}"))
    if not found:
        raise ModelError(f"{str(path)!r} has no {_FILE}; name a folder that scvi-tools' save() wrote")
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise ModelError(f"{str(path)!r} has several models, {names}; name one of these files")
    return found[0]


def _options(name: str, init_params: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of our config, from those that scvi-tools' model was made with."""
    given = dict(init_params["non_kwargs"])
    for more in init_params["kwargs"].values():
        given |= more
    if name == "LinearSCVI":
        given["use_batch_norm"] = "both" if given.get("use_batch_norm", True) else "encoder"
    for key, value in (given.pop("classifier_parameters", None) or {}).items():
        given[f"classifier_{key}"] = value
    known = {field.name for field in fields(_KINDS[name][1])}
    for key in [key for key in given if key not in known]:
        value = given.pop(key)
        if value is not None and (key not in _SILENT or value != _SILENT[key]):
            raise OptionError(f"its option {key}={value!r} is one that atlasvi has not")
    return given


def _fields(var_names: Any, registry: Mapping[str, Any]) -> FieldMap:
    setup, of = registry["setup_args"], registry["field_registries"]

    def levels(field: str) -> tuple[str, ...]:
        return tuple(as_level(value) for value in of[field]["state_registry"]["categorical_mapping"])

    batch_key, labels_key = setup.get("batch_key"), setup.get("labels_key")
    categorical = tuple(setup.get("categorical_covariate_keys") or ())
    mappings = of["extra_categorical_covs"]["state_registry"]["mappings"] if categorical else {}
    with_levels = {
        key: of[field]["state_registry"]["categorical_mapping"]
        for field, key in (("batch", batch_key), ("labels", labels_key))
        if key
    }
    with_levels |= {key: mappings[key] for key in categorical}
    unlabeled = setup.get("unlabeled_category")
    return FieldMap(
        var_names=tuple(str(name) for name in var_names),
        layer=setup.get("layer"),
        batch_key=batch_key,
        batch_categories=levels("batch") if batch_key else ("0",),
        labels_key=labels_key,
        labels_categories=levels("labels") if labels_key else ("0",),
        size_factor_key=setup.get("size_factor_key"),
        categorical_covariate_keys=categorical,
        categorical_covariate_categories=tuple(
            tuple(as_level(value) for value in mappings[key]) for key in categorical
        ),
        continuous_covariate_keys=tuple(setup.get("continuous_covariate_keys") or ()),
        unlabeled_category=None if unlabeled is None else as_level(unlabeled),
        number_keys=tuple(key for key, values in with_levels.items() if are_numbers(values)),
    )


def to_scvi_tools(model: SCVI, path: str | Path, *, overwrite: bool = False) -> None:
    """Write a `SCVI` as a folder that ``scvi.model.SCVI.load(path, adata)`` reads, with the same latents.

    Args:
        model: trained.
        path: the folder.
        overwrite: replace a model that is there.

    Raises:
        ModelError: there is a model already, or it is of a kind or likelihood that scvi-tools has not.
        NotTrainedError: the model is not trained.

    Example:
        >>> to_scvi_tools(model, "for-scvi-tools")
        >>> again = from_scvi_tools("for-scvi-tools", atlas)
        >>> bool(np.allclose(again.get_latent_representation(), model.get_latent_representation()))
        True
    """
    path = Path(path)
    if type(model) is not SCVI or model.config.gene_likelihood == "zip" or model.config.prior != "normal":
        raise ModelError(
            f"{model!r} cannot be written for scvi-tools; a SCVI of zinb, nb or poisson can, with "
            "prior='normal'"
        )
    model._must_be_trained()
    if path.exists() and not path.is_dir():
        raise ModelError(f"{str(path)!r} is a file; name a folder for the model")
    there = [p.name for p in path.iterdir()] if path.exists() else []
    if there and (not overwrite or there != [_FILE]):
        raise ModelError(
            f"there is a {str(path)!r} already; name another folder, or pass overwrite=True for one "
            f"that holds nothing but a {_FILE}"
        )
    state = weights_to(model.module, _besides(model))
    content = {
        "model_state_dict": OrderedDict(state),
        "var_names": np.array(model.fields.var_names, dtype=object),
        "attr_dict": {
            "registry_": _registry(model.fields),
            "init_params_": {"non_kwargs": _init_params(model.config), "kwargs": {"kwargs": {}}},
            "is_trained_": True,
            "history_": None,
            "train_indices_": None,
            "validation_indices_": None,
            "test_indices_": None,
        },
    }
    with replacing_folder(path) as new:
        torch.save(content, new / _FILE)


def _init_params(config: SCVIConfig) -> dict[str, Any]:
    ours = ("seed", "adversary", "mmd", "prior", "n_prior_components")
    return {name: value for name, value in asdict(config).items() if name not in ours}


def _besides(model: SCVI) -> dict[str, torch.Tensor]:
    """What scvi-tools' module has and ours does without: heads and an encoder that nothing is asked of."""
    config, n_vars = model.config, model.fields.n_vars
    every = replace(
        config, gene_likelihood="zinb", dispersion="gene-cell", use_observed_lib_size=False, adversary=0.0
    )
    moments = LibraryMoments((0.0,) * model.fields.n_batch, (1.0,) * model.fields.n_batch)
    module = SCVIModule(every, replace(model.fields, size_factor_key=None), moments)
    for parameter in module.parameters():
        parameter.data.zero_()
    nothing = weights_to(module, {})
    if not model.module.library_is_latent:
        del nothing["library_log_means"], nothing["library_log_vars"]
    if config.dispersion == "gene-cell":
        return nothing
    rows = {"gene": 1, "gene-batch": model.fields.n_batch, "gene-label": model.fields.n_labels}
    shape = (n_vars,) if config.dispersion == "gene" else (n_vars, rows[config.dispersion])
    return nothing | {"px_r": torch.zeros(shape)}


def _registry(fields: FieldMap) -> dict[str, Any]:
    """What scvi-tools calls the registry: where each column was, and its levels."""

    def column(attr: str, key: str) -> dict[str, str]:
        return {"attr_name": attr, "attr_key": key}

    def values(levels: tuple[str, ...], key: str) -> NDArray[Any]:
        return _as_in_obs(levels) if key in fields.number_keys else np.array(levels, dtype=object)

    def categories(levels: tuple[str, ...], key: str | None, default: str) -> dict[str, Any]:
        # Where no column was named scvi-tools makes one of zeros.
        mapping = np.zeros(1, np.int64) if key is None else values(levels, key)
        return {"categorical_mapping": mapping, "original_key": key or default}

    none: dict[str, Any] = {"data_registry": {}, "state_registry": {}, "summary_stats": {}}
    place = {"attr_name": "X", "attr_key": None} if fields.layer is None else column("layers", fields.layer)
    registries: dict[str, Any] = {
        "X": {
            "data_registry": place,
            "state_registry": {
                "n_obs": 0, "n_vars": fields.n_vars, "column_names": np.array(fields.var_names, dtype=object),
            },
            "summary_stats": {"n_vars": fields.n_vars, "n_cells": 0},
        },
        "batch": {
            "data_registry": column("obs", "_scvi_batch"),
            "state_registry": categories(fields.batch_categories, fields.batch_key, "_scvi_batch"),
            "summary_stats": {"n_batch": fields.n_batch},
        },
        "labels": {
            "data_registry": column("obs", "_scvi_labels"),
            "state_registry": categories(fields.labels_categories, fields.labels_key, "_scvi_labels"),
            "summary_stats": {"n_labels": fields.n_labels},
        },
        "size_factor": none, "extra_categorical_covs": none, "extra_continuous_covs": none,
    }  # fmt: skip
    if fields.size_factor_key is not None:
        registries["size_factor"] = none | {"data_registry": column("obs", fields.size_factor_key)}
    if fields.categorical_covariate_keys:
        keys, levels = fields.categorical_covariate_keys, fields.categorical_covariate_categories
        registries["extra_categorical_covs"] = {
            "data_registry": column("obsm", "_scvi_extra_categorical_covs"),
            "state_registry": {
                "mappings": {k: values(v, k) for k, v in zip(keys, levels, strict=True)},
                "field_keys": list(keys),
                "n_cats_per_key": list(fields.n_levels),
            },
            "summary_stats": {"n_extra_categorical_covs": len(keys)},
        }
    if fields.continuous_covariate_keys:
        keys = fields.continuous_covariate_keys
        registries["extra_continuous_covs"] = {
            "data_registry": column("obsm", "_scvi_extra_continuous_covs"),
            "state_registry": {"columns": np.array(keys, dtype=object)},
            "summary_stats": {"n_extra_continuous_covs": len(keys)},
        }
    return {
        "scvi_version": "1.4.2",
        "model_name": "SCVI",
        "setup_method_name": "setup_anndata",
        "setup_args": {
            "layer": fields.layer, "batch_key": fields.batch_key, "labels_key": fields.labels_key,
            "size_factor_key": fields.size_factor_key,
            "categorical_covariate_keys": list(fields.categorical_covariate_keys) or None,
            "continuous_covariate_keys": list(fields.continuous_covariate_keys) or None,
        },
        "field_registries": registries,
    }  # fmt: skip


def _as_in_obs(levels: tuple[str, ...]) -> NDArray[Any]:
    """Levels of a column that holds numbers, or true and false; text where some are neither."""
    if set(levels) <= {"False", "True"}:
        return np.array([level == "True" for level in levels])
    for kind in (int, float):
        try:
            return np.array([kind(level) for level in levels])
        except ValueError:
            continue
    return np.array(levels, dtype=object)


__all__ = ["from_scvi_tools", "to_scvi_tools", "weights_from", "weights_to"]
