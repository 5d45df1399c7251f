"""With the weights of scvi-tools' models copied in, ours must say the same.

The fixture is what `benchmarks/peers/scvi_tools_fixtures.py` wrote, run with scvi-tools 1.4.2.
"""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from atlasvi_kernels import CSR

from atlasvi.models.data import LibraryMoments
from atlasvi.models.scvi import SCVIConfig, SCVIModule
from atlasvi.train.schedule import TrainingPlan
from atlasvi.types import FieldMap, Minibatch, StepWeights

FIXTURES = Path(__file__).parent / "fixtures"
INDEX = json.loads((FIXTURES / "scvi_tools.json").read_text())
CASES = sorted(INDEX["cases"])
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}
LEVELS = {"batch": 3, "label": 2, "donor": 4, "kit": 2}


def load():
    arrays = {}
    with np.load(FIXTURES / "scvi_tools.npz") as file:
        for case, entries in json.loads(file["layout"].tobytes()).items():
            flat, at, arrays[case] = file[case], 0, {}
            for name, shape in entries:
                n = math.prod(shape)
                arrays[case][name] = torch.from_numpy(flat[at : at + n].reshape(shape).copy())
                at += n
    return arrays


ARRAYS = load()


class FixedNoise:
    """Draws that are given, in place of `types.Noise`."""

    def __init__(self, z, library=None):
        self.draws = [z, library]

    def normal(self, n, stream):
        draw = self.draws[stream]
        assert draw.shape[1] == n
        return draw

    def uniform(self, n, stream):
        raise AssertionError("these models have no dropout")


def make_fields(setup, n_vars):
    def levels(key):
        return tuple(f"{key}{i}" for i in range(LEVELS[key])) if key else ("0",)

    categorical = tuple(setup.get("categorical_covariate_keys") or ())
    return FieldMap(
        var_names=tuple(f"g{i}" for i in range(n_vars)),
        batch_key=setup.get("batch_key"),
        batch_categories=levels(setup.get("batch_key")),
        labels_key=setup.get("labels_key"),
        labels_categories=levels(setup.get("labels_key")),
        size_factor_key=setup.get("size_factor_key"),
        categorical_covariate_keys=categorical,
        categorical_covariate_categories=tuple(levels(key) for key in categorical),
        continuous_covariate_keys=tuple(setup.get("continuous_covariate_keys") or ()),
    )


def make_minibatch(fields, **change):
    data = ARRAYS["data"]
    n = len(data["counts"])
    values = {
        "counts": CSR.from_scipy(sp.csr_matrix(data["counts"].numpy().astype(np.uint16))),
        "rows": torch.arange(n),
        "batch_index": data["batch"].long() if fields.batch_key else torch.zeros(n, dtype=torch.int64),
        "labels": data["label"].long() if fields.labels_key else torch.zeros(n, dtype=torch.int64),
        "cat_covs": torch.stack(
            [data[key].long() for key in fields.categorical_covariate_keys]
            or [torch.empty(0, dtype=torch.int64)] * n,
            1 if fields.categorical_covariate_keys else 0,
        ),
        "cont_covs": torch.stack(
            [data[key] for key in fields.continuous_covariate_keys] or [torch.empty(0)] * n,
            1 if fields.continuous_covariate_keys else 0,
        ),
        "size_factor": data["size_factor"] if fields.size_factor_key else None,
    }
    return Minibatch(**{**values, **change})


def our_names(config, fields, module):
    """Our parameter -> (its name in scvi-tools, how to turn theirs into ours)."""
    names = {}

    def mlp(ours, theirs):
        for i, linear in enumerate(ours.linears):
            prefix, key = f"{theirs}.fc_layers.Layer {i}.", f"{path_of[linear]}."
            n_in = len(linear.weight)
            names[key + "weight"] = (prefix + "0.weight", lambda w, n=n_in: w[:, :n].T)
            names[key + "bias"] = (prefix + "0.bias", lambda b: b)
            if linear.covariate_weight is not None:
                names[key + "covariate_weight"] = (prefix + "0.weight", lambda w, n=n_in: w[:, n:].T)
            if len(ours.batch_norms):
                for part in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
                    names[f"{path_of[ours.batch_norms[i]]}.{part}"] = (prefix + f"1.{part}", lambda v: v)

    def linear(ours, theirs):
        for part in ("weight", "bias"):
            names[f"{path_of[ours]}.{part}"] = (f"{theirs}.{part}", lambda v: v)

    path_of = {submodule: path for path, submodule in module.named_modules()}
    encoders = [(module.encoder, "z_encoder")]
    if module.library_is_latent:
        encoders.append((module.library_encoder, "l_encoder"))
        names["library_log_mean"] = ("library_log_means", lambda v: v[0])
        names["library_log_var"] = ("library_log_vars", lambda v: v[0])
    for ours, theirs in encoders:
        mlp(ours.mlp, f"{theirs}.encoder")
        linear(ours.loc, f"{theirs}.mean_encoder")
        linear(ours.log_variance, f"{theirs}.var_encoder")
    mlp(module.decoder.mlp, "decoder.px_decoder")
    linear(module.decoder.scale, "decoder.px_scale_decoder.0")
    if module.decoder.pi is not None:
        linear(module.decoder.pi, "decoder.px_dropout_decoder")
    if module.decoder.log_theta is not None:
        linear(module.decoder.log_theta, "decoder.px_r_decoder")
    if hasattr(module, "log_theta"):
        names["log_theta"] = ("px_r", lambda v: v.reshape(fields.n_vars, -1).T)
    return names


def make_module(case):
    spec = INDEX["cases"][case]
    fields = make_fields(spec["setup"], ARRAYS["data"]["counts"].shape[1])
    config = SCVIConfig(n_hidden=8, n_latent=3, dropout_rate=0.0, **spec["init"])
    moments = LibraryMoments((0.0,) * fields.n_batch, (1.0,) * fields.n_batch)
    module = SCVIModule(config, fields, moments)
    names = our_names(config, fields, module)
    theirs = {k.removeprefix("weights/"): v for k, v in ARRAYS[case].items() if k.startswith("weights/")}
    state = {ours: convert(theirs[name]) for ours, (name, convert) in names.items()}
    module.load_state_dict(state)  # strict: nothing of ours is left as it was
    return module.eval(), fields, names


@pytest.mark.parametrize("case", CASES)
def test_evaluation_agrees(case):
    module, fields, _ = make_module(case)
    minibatch = make_minibatch(fields)
    expected = {k.removeprefix("eval/"): v for k, v in ARRAYS[case].items() if k.startswith("eval/")}
    with torch.no_grad():
        qz = module.encode(minibatch)
        torch.testing.assert_close(qz.loc, expected["qz_loc"], **TOLERANCE)
        torch.testing.assert_close(qz.scale, expected["qz_scale"], **TOLERANCE)
        if "ql_loc" in expected:
            ql = module.encode_library(minibatch)
            torch.testing.assert_close(ql.loc, expected["ql_loc"], **TOLERANCE)
            torch.testing.assert_close(ql.scale, expected["ql_scale"], **TOLERANCE)
        rho = module.decode_log_rho(qz.loc, minibatch).exp()
        torch.testing.assert_close(rho, expected["rho"], **TOLERANCE)
        genes = torch.tensor([4, 0, 11])
        torch.testing.assert_close(module.decode_log_rho(qz.loc, minibatch, genes).exp(), rho[:, genes])
        library, _ = module.library(minibatch)
        torch.testing.assert_close(library[:, None] * rho, expected["rate"], **TOLERANCE)
        if "theta" in expected:
            h = module.decoder.hidden(qz.loc, _covariates_of(minibatch))
            theta, index = module.theta(minibatch)
            theta = theta(h).exp() if isinstance(theta, torch.nn.Linear) else theta
            theta = theta if index is None else theta[index]
            torch.testing.assert_close(theta.expand_as(rho), expected["theta"], **TOLERANCE)
        if "rho_transformed" in expected:
            moved = make_minibatch(
                fields, batch_index=torch.full_like(minibatch.batch_index, INDEX["transform_batch"])
            )
            torch.testing.assert_close(
                module.decode_log_rho(qz.loc, moved).exp(), expected["rho_transformed"], **TOLERANCE
            )
        zero = FixedNoise(torch.zeros_like(qz.loc), torch.zeros(len(rho), 1))
        terms = module.loss(minibatch, zero, StepWeights(kl=INDEX["kl_weight"]))
    torch.testing.assert_close(terms.reconstruction, expected["reconstruction"], **TOLERANCE)
    torch.testing.assert_close(terms.kl_z, expected["kl_z"], **TOLERANCE)
    torch.testing.assert_close(terms.kl_library, expected["kl_library"], **TOLERANCE)
    torch.testing.assert_close(terms.total, expected["total"], **TOLERANCE)


def _covariates_of(minibatch):
    from atlasvi.models.scvi import covariates

    return covariates(minibatch)


@pytest.mark.parametrize("case", [case for case in CASES if INDEX["cases"][case]["train"]])
def test_a_training_step_agrees(case):
    """Loss, the gradient of every parameter by name, and the batch-norm statistics after the step."""
    module, fields, names = make_module(case)
    module.train()
    data, arrays = ARRAYS["data"], ARRAYS[case]
    noise = FixedNoise(data["z_epsilon"], data["library_epsilon"])
    terms = module.loss(make_minibatch(fields), noise, StepWeights(kl=INDEX["kl_weight"]))
    torch.testing.assert_close(terms.reconstruction, arrays["train/reconstruction"], **TOLERANCE)
    torch.testing.assert_close(terms.kl_z, arrays["train/kl_z"], **TOLERANCE)
    torch.testing.assert_close(terms.total.detach(), arrays["train/total"], **TOLERANCE)
    terms.total.backward()
    compared = 0
    for name, parameter in module.named_parameters():
        theirs, convert = names[name]
        expected = convert(arrays[f"gradient/{theirs}"])
        torch.testing.assert_close(
            parameter.grad, expected, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )
        compared += 1
    assert compared == len(list(module.parameters())) > 10
    for name, buffer in module.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            torch.testing.assert_close(buffer, arrays[f"after/{names[name][0]}"], **TOLERANCE)


def test_the_plan_is_theirs():
    plan = TrainingPlan()
    assert (plan.optimizer, plan.lr, plan.eps, plan.weight_decay) == ("Adam", 1e-3, 0.01, 1e-6)
    assert [plan.kl_weight(epoch, 0) for epoch in (0, 100, 400, 1000)] == [0.0, 0.25, 1.0, 1.0]
