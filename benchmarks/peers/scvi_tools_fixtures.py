"""What small scvi-tools models say, written down so that atlasvi can be held against it without scvi-tools.

Run with the peer's Python (`scvi_tools_env.sh` makes it), from the root of the repository::

    DIR/bin/python -m benchmarks.peers.scvi_tools_fixtures tests/oracle/fixtures

`scvi_tools.json` says how each case was built. `scvi_tools.npz` holds the numbers: one flat float32 array
a case, and `layout`, JSON as bytes, with the name and shape of each array that lies in it, in order
(a case has forty of them, and a zip entry for each would be most of the file). `data` has the cells.

Every weight, batch-norm statistic and affine parameter is drawn at random, so that none is at its default.
z and the library size are never drawn: evaluation takes their means, training the epsilons in `data`.
"""

from __future__ import annotations

import json
import sys
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

Arrays = dict[str, np.ndarray]
N_OBS, N_VARS, N_LATENT, N_HIDDEN = 20, 15, 3, 8
BATCHES, LABELS, DONORS, KITS = 3, 2, 4, 2
KL_WEIGHT = 0.37
TRANSFORM_BATCH = 1
BATCH_LABELS = {"batch_key": "batch", "labels_key": "label"}
COVARIATES = {
    **BATCH_LABELS,
    "categorical_covariate_keys": ["donor"],
    "continuous_covariate_keys": ["age", "mito"],
}
TWO_CATEGORICAL = {**BATCH_LABELS, "categorical_covariate_keys": ["donor", "kit"]}
SIZE_FACTOR = {**COVARIATES, "size_factor_key": "size_factor"}
LIKELIHOODS = ("zinb", "nb", "poisson")
DISPERSIONS = ("gene", "gene-batch", "gene-label", "gene-cell")


def _case(setup: dict[str, Any], *, train: bool = False, **init: Any) -> dict[str, Any]:
    return {"setup": setup, "init": init, "train": train}


def cases() -> dict[str, dict[str, Any]]:
    """Name -> arguments of ``setup_anndata`` and of ``SCVI``, and whether it is a case with gradients."""
    grid = {
        f"{likelihood}/{dispersion}": _case(BATCH_LABELS, gene_likelihood=likelihood, dispersion=dispersion)
        for likelihood, dispersion in product(LIKELIHOODS, DISPERSIONS)
    }
    deep = {"n_layers": 2, "encode_covariates": True}
    return grid | {
        "covariates/decoder-only": _case(COVARIATES),
        "covariates/encoded": _case(COVARIATES, encode_covariates=True),
        "covariates/encoded-2-layers": _case(COVARIATES, **deep),
        "covariates/encoded-2-layers-shallow": _case(COVARIATES, **deep, deeply_inject_covariates=False),
        "covariates/nb-3-layers": _case(
            COVARIATES, n_layers=3, encode_covariates=True, gene_likelihood="nb", dispersion="gene-batch"
        ),
        "covariates/decoder-only-3-layers-shallow": _case(
            COVARIATES, n_layers=3, deeply_inject_covariates=False
        ),
        "covariates/two-categorical": _case(TWO_CATEGORICAL, **deep),
        "covariates/continuous-only": _case(
            {"continuous_covariate_keys": ["age", "mito"]}, encode_covariates=True
        ),
        "one-batch": _case({}, encode_covariates=True),
        "norm/none": _case(BATCH_LABELS, use_batch_norm="none"),
        "norm/layer": _case(BATCH_LABELS, use_batch_norm="none", use_layer_norm="both", n_layers=2),
        "norm/both": _case(BATCH_LABELS, use_layer_norm="both"),
        "norm/batch-encoder-layer-decoder": _case(
            BATCH_LABELS, use_batch_norm="encoder", use_layer_norm="decoder"
        ),
        "norm/layer-encoder-batch-decoder": _case(
            BATCH_LABELS, use_batch_norm="decoder", use_layer_norm="encoder", n_layers=2
        ),
        "library/zinb": _case(BATCH_LABELS, use_observed_lib_size=False),
        "library/nb-covariates": _case(
            COVARIATES, **deep, use_observed_lib_size=False, gene_likelihood="nb", dispersion="gene-label"
        ),
        "library/poisson-encoded": _case(
            BATCH_LABELS, use_observed_lib_size=False, gene_likelihood="poisson", encode_covariates=True
        ),
        "library/one-batch": _case({}, use_observed_lib_size=False),
        "size-factor/zinb": _case(SIZE_FACTOR),
        "size-factor/nb-gene-cell": _case(SIZE_FACTOR, gene_likelihood="nb", dispersion="gene-cell"),
        # A size factor wins over a library size that was asked to be latent.
        "size-factor/latent-library": _case(SIZE_FACTOR, use_observed_lib_size=False),
        "train/zinb": _case(COVARIATES, train=True, encode_covariates=True),
        "train/nb": _case(
            COVARIATES, train=True, **deep, gene_likelihood="nb", dispersion="gene-batch",
            use_observed_lib_size=False,
        ),
    }  # fmt: skip


def cells() -> Arrays:
    """Counts whose library sizes span a factor of a hundred, codes, covariates, and noise for training."""
    rng = np.random.default_rng(20240101)
    mean = rng.gamma(0.6, 4.0, N_VARS) * rng.lognormal(0.5, 1.3, N_OBS)[:, None]
    counts = rng.negative_binomial(1.5, 1.5 / (1.5 + mean))
    counts[np.arange(N_OBS), rng.integers(0, N_VARS, N_OBS)] += 1  # no empty cell: its log total is -inf

    def codes(n_levels: int) -> np.ndarray:
        return rng.permutation(np.arange(N_OBS) % n_levels)

    return {
        "counts": counts,
        "batch": codes(BATCHES),
        "label": codes(LABELS),
        "donor": codes(DONORS),
        "kit": codes(KITS),
        "age": rng.normal(0, 1, N_OBS),
        "mito": rng.uniform(-1, 2, N_OBS),
        "size_factor": rng.lognormal(2, 0.7, N_OBS),
        "z_epsilon": rng.normal(0, 1, (N_OBS, N_LATENT)),
        "library_epsilon": rng.normal(0, 1, (N_OBS, 1)),
    }


def _anndata(data: Arrays) -> Any:
    import anndata as ad
    import pandas as pd

    obs = pd.DataFrame(index=[f"cell{i}" for i in range(N_OBS)])
    for key, n_levels in (("batch", BATCHES), ("label", LABELS), ("donor", DONORS), ("kit", KITS)):
        obs[key] = pd.Categorical.from_codes(data[key].astype(int), [f"{key}{i}" for i in range(n_levels)])
    for key in ("age", "mito", "size_factor"):
        obs[key] = data[key].astype(np.float32)
    var = pd.DataFrame(index=[f"gene{i}" for i in range(N_VARS)])
    return ad.AnnData(data["counts"].astype(np.float32), obs, var)


def _randomise(module: Any, rng: np.random.Generator) -> None:
    import torch

    state = module.state_dict()
    for name, value in state.items():
        shape = tuple(value.shape)
        if name.startswith("library_log_") or name.endswith("num_batches_tracked"):
            continue  # the data's own moments, and a counter
        if name == "px_r":
            new = rng.normal(0.5, 0.8, shape)
        elif name.endswith("running_var"):
            new = rng.uniform(0.3, 2.0, shape)
        elif name.endswith("running_mean"):
            new = rng.normal(0, 0.5, shape)
        elif name.endswith(".1.weight"):  # batch norm's scale
            new = rng.uniform(0.5, 1.5, shape)
        elif name.startswith("l_encoder.mean_encoder.bias"):
            new = rng.normal(4, 0.3, shape)  # as log library sizes are
        else:
            new = rng.normal(0, 0.35, shape)
        # Eleven bits are as good a draw as 24, and halve the file.
        state[name] = torch.tensor(new.astype(np.float16), dtype=value.dtype)
    module.load_state_dict(state)


def _minibatch(model: Any) -> dict[str, Any]:
    loader = model._make_data_loader(adata=model.adata, batch_size=N_OBS, shuffle=False)
    (tensors,) = list(loader)
    return tensors


def _forward(module: Any, tensors: dict[str, Any], noise: dict[str, Any] | None) -> tuple[Any, Any, Any]:
    inference = module.inference(**module._get_inference_input(tensors))
    qz, ql = inference["qz"], inference["ql"]
    inference["z"] = qz.loc if noise is None else qz.loc + qz.scale * noise["z_epsilon"]
    if ql is not None:
        inference["library"] = ql.loc if noise is None else ql.loc + ql.scale * noise["library_epsilon"]
    generative = module.generative(**module._get_generative_input(tensors, inference))
    return inference, generative, module.loss(tensors, inference, generative, kl_weight=KL_WEIGHT)


def _outputs(inference: Any, generative: Any, losses: Any) -> dict[str, Any]:
    px = generative["px"]
    out = {
        "qz_loc": inference["qz"].loc,
        "qz_scale": inference["qz"].scale,
        "log_library": inference["library"],
        "rho": px.scale,
        "rate": px.rate if hasattr(px, "rate") else px.mu,
        "reconstruction": losses.reconstruction_loss["reconstruction_loss"],
        "kl_z": losses.kl_local["kl_divergence_z"],
        "kl_library": losses.kl_local["kl_divergence_l"],
        "total": losses.loss,
    }
    if inference["ql"] is not None:
        out |= {"ql_loc": inference["ql"].loc, "ql_scale": inference["ql"].scale}
    if hasattr(px, "theta"):
        out["theta"] = px.theta
    if hasattr(px, "zi_logits"):
        out["pi_logits"] = px.zi_logits
    return out


def _evaluate(module: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    import torch

    module.eval()
    with torch.no_grad():
        inference, generative, losses = _forward(module, tensors, None)
        out = _outputs(inference, generative, losses)
        if module.n_batch > 1:
            inputs = module._get_generative_input(tensors, inference)
            moved = module.generative(**inputs, transform_batch=torch.tensor(TRANSFORM_BATCH))
            out["rho_transformed"] = moved["px"].scale
    return {f"eval/{name}": value for name, value in out.items()}


def _train(module: Any, tensors: dict[str, Any], data: Arrays) -> dict[str, Any]:
    import torch

    noise = {key: torch.tensor(data[key], dtype=torch.float32) for key in ("z_epsilon", "library_epsilon")}
    module.train()
    inference, generative, losses = _forward(module, tensors, noise)
    losses.loss.backward()
    out = {f"train/{name}": value.detach() for name, value in _outputs(inference, generative, losses).items()}
    for name, parameter in module.named_parameters():
        if parameter.grad is not None:
            out[f"gradient/{name}"] = parameter.grad
    for name, value in module.named_buffers():  # running statistics after the one step
        if "running" in name:
            out[f"after/{name}"] = value
    return out


def build(case: dict[str, Any], data: Arrays, rng: np.random.Generator) -> Arrays:
    """Every array of a case: ``weights/`` and ``eval/``; for a training case three more groups."""
    from scvi.model import SCVI

    adata = _anndata(data)
    SCVI.setup_anndata(adata, **case["setup"])
    model = SCVI(adata, n_hidden=N_HIDDEN, n_latent=N_LATENT, dropout_rate=0.0, **case["init"])
    module = model.module
    _randomise(module, rng)
    arrays = {f"weights/{name}": value.clone() for name, value in module.state_dict().items()}
    tensors = _minibatch(model)
    arrays |= _evaluate(module, tensors)
    if case["train"]:
        arrays |= _train(module, tensors, data)
    arrays = {name: value.numpy().astype(np.float32) for name, value in arrays.items()}
    broken = [name for name, value in arrays.items() if not np.isfinite(value).all()]
    if broken:
        raise ValueError(f"{broken} have values that are not finite; the weights are drawn too wide")
    return arrays


def main(out: Path) -> None:
    """Write ``scvi_tools.json`` and ``scvi_tools.npz`` into ``out``."""
    import scvi
    import torch

    torch.set_num_threads(1)
    out.mkdir(parents=True, exist_ok=True)
    data = {key: value.astype(np.float32) for key, value in cells().items()}
    numbers = {"data": data}
    for i, (name, case) in enumerate(cases().items()):
        numbers[name] = build(case, data, np.random.default_rng([7, i]))
        print(f"{name}: total {float(numbers[name]['eval/total']):.4f} nats a cell", flush=True)
    layout = {
        name: [[key, list(value.shape)] for key, value in arrays.items()] for name, arrays in numbers.items()
    }
    flat = {name: np.concatenate([v.ravel() for v in arrays.values()]) for name, arrays in numbers.items()}
    packed = np.frombuffer(json.dumps(layout, separators=(",", ":")).encode(), dtype=np.uint8)
    np.savez_compressed(out / "scvi_tools.npz", layout=packed, **flat)
    about = {
        "made by": "benchmarks/peers/scvi_tools_fixtures.py",
        "scvi-tools": scvi.__version__,
        "torch": torch.__version__.split("+")[0],
        "n_obs": N_OBS,
        "n_vars": N_VARS,
        "n_hidden": N_HIDDEN,
        "n_latent": N_LATENT,
        "dropout_rate": 0.0,
        "kl_weight": KL_WEIGHT,
        "transform_batch": TRANSFORM_BATCH,
        "levels": {"batch": BATCHES, "label": LABELS, "donor": DONORS, "kit": KITS},
        "cases": cases(),
    }
    (out / "scvi_tools.json").write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m benchmarks.peers.scvi_tools_fixtures OUT_DIR")
    main(Path(sys.argv[1]))
