"""With the weights of scvi-tools' LinearSCVI and SCANVI copied in, ours must say the same.

The fixture is what `benchmarks/peers/scvi_tools_family_fixtures.py` wrote, run with scvi-tools 1.4.2.
"""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from atlasvi_kernels import CSR

from atlasvi.models.convert import weights_from
from atlasvi.models.data import LibraryMoments
from atlasvi.models.ldvae import LinearSCVIConfig, LinearSCVIModule
from atlasvi.models.scanvi import SCANVIConfig, SCANVIModule
from atlasvi.types import FieldMap, Minibatch, StepWeights

FIXTURES = Path(__file__).parent / "fixtures"
INDEX = json.loads((FIXTURES / "scvi_tools_family.json").read_text())
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}
LEVELS = {"batch": 3, "label": 2, "donor": 4, "kit": 2}
SCANVI = sorted(case for case, spec in INDEX["cases"].items() if spec["model"] == "SCANVI")
LINEAR = sorted(case for case, spec in INDEX["cases"].items() if spec["model"] == "LinearSCVI")


def load():
    arrays = {}
    with np.load(FIXTURES / "scvi_tools_family.npz") as file:
        for case, entries in json.loads(file["layout"].tobytes()).items():
            flat, at, arrays[case] = file[case], 0, {}
            for name, shape in entries:
                n = math.prod(shape)
                arrays[case][name] = torch.from_numpy(flat[at : at + n].reshape(shape).copy())
                at += n
    return arrays


ARRAYS = load()
DATA = ARRAYS["data"]


def group(case, prefix):
    return {k.removeprefix(prefix): v for k, v in ARRAYS[case].items() if k.startswith(prefix)}


class GivenNoise:
    """Draws by their stream, in place of `types.Noise`: those of the fixture, or zeros."""

    seed = step = 0

    def __init__(self, draws):
        self.draws = draws

    def normal(self, n, stream):
        draw = self.draws[stream]
        assert draw.shape[1] == n
        return draw

    def uniform(self, n, stream):
        raise AssertionError("these models have no dropout")


def make_fields(setup):
    def levels(key):
        return tuple(f"{key}{i}" for i in range(LEVELS[key])) if key else ("0",)

    categorical = tuple(setup.get("categorical_covariate_keys") or ())
    return FieldMap(
        var_names=tuple(f"g{i}" for i in range(DATA["counts"].shape[1])),
        batch_key=setup.get("batch_key"),
        batch_categories=levels(setup.get("batch_key")),
        labels_key=setup.get("labels_key"),
        labels_categories=levels(setup.get("labels_key")),
        categorical_covariate_keys=categorical,
        categorical_covariate_categories=tuple(levels(key) for key in categorical),
        continuous_covariate_keys=tuple(setup.get("continuous_covariate_keys") or ()),
    )


def make_minibatch(fields, cells=slice(None)):
    counts = DATA["counts"].numpy().astype(np.uint16)[cells]
    n = len(counts)
    nothing = torch.empty(n, 0)

    def stack(keys):
        return torch.stack([DATA[key][cells] for key in keys], 1) if keys else nothing

    return Minibatch(
        CSR.from_scipy(sp.csr_matrix(counts)),
        torch.arange(n),
        DATA["batch"][cells].long() if fields.batch_key else torch.zeros(n, dtype=torch.int64),
        DATA[fields.labels_key][cells].long() if fields.labels_key else torch.zeros(n, dtype=torch.int64),
        stack(fields.categorical_covariate_keys).long(),
        stack(fields.continuous_covariate_keys),
    )


def make_linear(case):
    spec = INDEX["cases"][case]
    fields = make_fields(spec["setup"])
    init = dict(spec["init"])
    if init.pop("use_batch_norm", True) is False:
        init["use_batch_norm"] = "encoder"  # theirs means the decoder's
    config = LinearSCVIConfig(n_hidden=8, n_latent=3, dropout_rate=0.0, **init)
    moments = LibraryMoments((0.0,) * fields.n_batch, (1.0,) * fields.n_batch)
    module = LinearSCVIModule(config, fields, moments)
    module.load_state_dict(weights_from(group(case, "weights/"), module))  # strict
    return module, fields


@pytest.mark.parametrize("case", LINEAR)
def test_linear_evaluation_agrees(case):
    module, fields = make_linear(case)
    module.eval()
    minibatch, expected = make_minibatch(fields), group(case, "eval/")
    with torch.no_grad():
        qz = module.encode(minibatch)
        torch.testing.assert_close(qz.loc, expected["qz_loc"], **TOLERANCE)
        torch.testing.assert_close(qz.scale, expected["qz_scale"], **TOLERANCE)
        rho = module.decode_log_rho(qz.loc, minibatch).exp()
        torch.testing.assert_close(rho, expected["rho"], **TOLERANCE)
        genes = torch.tensor([4, 0, 11])
        torch.testing.assert_close(module.decode_log_rho(qz.loc, minibatch, genes).exp(), rho[:, genes])
        noise = GivenNoise({0: torch.zeros_like(qz.loc), 1: torch.zeros(len(rho), 1)})
        terms = module.loss(minibatch, noise, StepWeights(kl=INDEX["kl_weight"]))
        weight, _ = module.decoder.scale.folded()
        torch.testing.assert_close(weight[:, :3], expected["loadings"], **TOLERANCE)
    torch.testing.assert_close(terms.reconstruction, expected["reconstruction"], **TOLERANCE)
    torch.testing.assert_close(terms.kl_z, expected["kl_z"], **TOLERANCE)
    torch.testing.assert_close(terms.kl_library, expected["kl_library"], **TOLERANCE)
    torch.testing.assert_close(terms.total, expected["total"], **TOLERANCE)


@pytest.mark.parametrize("case", [case for case in LINEAR if INDEX["cases"][case]["train"]])
def test_a_linear_training_step_agrees(case):
    module, fields = make_linear(case)
    module.train()
    noise = GivenNoise({0: DATA["z_epsilon"], 1: DATA["library_epsilon"]})
    terms = module.loss(make_minibatch(fields), noise, StepWeights(kl=INDEX["kl_weight"]))
    torch.testing.assert_close(terms.total.detach(), ARRAYS[case]["train/total"], **TOLERANCE)
    terms.total.backward()
    assert_same_gradients(module, case)


def make_scanvi(case):
    spec = INDEX["cases"][case]
    fields = make_fields(spec["setup"])
    fields = replace(fields, unlabeled_category=INDEX["unlabeled_category"])
    config = SCANVIConfig(
        n_hidden=8, n_latent=3, dropout_rate=0.0, classification_ratio=INDEX["classification_ratio"],
        **spec["init"],
    )  # fmt: skip
    moments = LibraryMoments((0.0,) * fields.n_batch, (1.0,) * fields.n_batch)
    module = SCANVIModule(config, fields, moments)
    module.load_state_dict(weights_from(group(case, "weights/"), module))  # strict
    known = (DATA["donor"] < INDEX["n_known"]).numpy()
    return module, replace(make_minibatch(fields), labelled=make_minibatch(fields, known))


def scanvi_noise():
    n, k = len(DATA["counts"]), INDEX["n_known"]
    u = DATA["z2_epsilon"].view(k, n, -1).transpose(0, 1).reshape(n, -1)  # theirs come label by label
    return {0: DATA["z_epsilon"], 1: DATA["library_epsilon"], 2: u}


def assert_same_terms(terms, expected):
    torch.testing.assert_close(
        terms.elbo, expected["reconstruction"] + expected["kl"], **TOLERANCE
    )  # theirs counts z among the reconstruction
    torch.testing.assert_close(terms.total.detach(), expected["total"], **TOLERANCE)


@pytest.mark.parametrize("case", SCANVI)
def test_scanvi_evaluation_agrees(case):
    module, minibatch = make_scanvi(case)
    module.eval()
    expected = group(case, "eval/")
    with torch.no_grad():
        qz = module.encode(minibatch)
        torch.testing.assert_close(qz.loc, expected["qz_loc"], **TOLERANCE)
        torch.testing.assert_close(qz.scale, expected["qz_scale"], **TOLERANCE)
        rho = module.decode_log_rho(qz.loc, minibatch).exp()
        torch.testing.assert_close(rho, expected["rho"], **TOLERANCE)
        torch.testing.assert_close(module.class_logits(minibatch), expected["class_logits"], **TOLERANCE)
        noise = GivenNoise({stream: torch.zeros_like(draw) for stream, draw in scanvi_noise().items()})
        terms = module.loss(minibatch, noise, StepWeights(kl=INDEX["kl_weight"]))
    loss = terms.classification.mean() / module.config.classification_ratio
    torch.testing.assert_close(loss, expected["classification"].reshape(()), **TOLERANCE)
    assert_same_terms(terms, expected)


@pytest.mark.parametrize("case", [case for case in SCANVI if INDEX["cases"][case]["train"]])
def test_a_scanvi_training_step_agrees(case):
    module, minibatch = make_scanvi(case)
    module.train()
    terms = module.loss(minibatch, GivenNoise(scanvi_noise()), StepWeights(kl=INDEX["kl_weight"]))
    assert_same_terms(terms, group(case, "train/"))
    terms.total.backward()
    assert_same_gradients(module, case)


def assert_same_gradients(module, case):
    """Gradients are laid out as the weights are, so the same function turns theirs into ours."""
    theirs = group(case, "weights/")
    theirs = {name: torch.zeros_like(value) for name, value in theirs.items()} | group(case, "gradient/")
    expected, compared = weights_from(theirs, module), 0
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(
            parameter.grad, expected[name], rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )
        compared += 1
    assert compared == len(list(module.parameters())) > 8
