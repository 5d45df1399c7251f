"""What small LinearSCVI and SCANVI models of scvi-tools say, as `scvi_tools_fixtures` does for SCVI.

Run with the peer's Python (`scvi_tools_env.sh` makes it), from the root of the repository::

    DIR/bin/python -m benchmarks.peers.scvi_tools_family_fixtures tests/oracle/fixtures

`scvi_tools_family.json` says how each case was built, `scvi_tools_family.npz` holds the numbers, laid out
as in `scvi_tools.npz`. Every weight is drawn at random. Draws of z, of the library size and of SCANVI's
second latent are the epsilons in `data`: zero in evaluation, and those numbers where a case has gradients.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers.scvi_tools_fixtures import (
    KL_WEIGHT,
    N_HIDDEN,
    N_LATENT,
    N_OBS,
    Arrays,
    _anndata,
    _minibatch,
    _outputs,
    _randomise,
    cells,
)

UNLABELED = "donor3"
N_KNOWN = 3
CLASSIFICATION_RATIO = 50.0
BATCH = {"batch_key": "batch"}
LABELS = {**BATCH, "labels_key": "donor", "unlabeled_category": UNLABELED}
COVARIATES = {
    **LABELS,
    "categorical_covariate_keys": ["kit"],
    "continuous_covariate_keys": ["age", "mito"],
}


def _case(model: str, setup: dict[str, Any], *, train: bool = False, **init: Any) -> dict[str, Any]:
    return {"model": model, "setup": setup, "init": init, "train": train}


def cases() -> dict[str, dict[str, Any]]:
    """Name -> the model, arguments of ``setup_anndata`` and of the constructor; whether it has gradients."""
    return {
        "linear/nb": _case("LinearSCVI", BATCH, train=True),
        "linear/zinb-observed": _case(
            "LinearSCVI", BATCH, train=True, gene_likelihood="zinb", use_observed_lib_size=True
        ),
        "linear/poisson-no-norm": _case(
            "LinearSCVI", BATCH, gene_likelihood="poisson", use_batch_norm=False, bias=True
        ),
        "linear/one-batch-2-layers": _case("LinearSCVI", {}, n_layers=2),
        "scanvi/zinb": _case("SCANVI", LABELS, train=True),
        "scanvi/nb-covariates": _case(
            "SCANVI", COVARIATES, train=True, gene_likelihood="nb", n_layers=2, encode_covariates=True
        ),
        "scanvi/linear-classifier": _case(
            "SCANVI", LABELS, linear_classifier=True, gene_likelihood="poisson"
        ),
        "scanvi/latent-library": _case(
            "SCANVI", LABELS, use_observed_lib_size=False, dispersion="gene-batch"
        ),
    }


def _fix_draws(noise: dict[str, Any]) -> None:
    """Have each normal that is drawn from take its epsilon by the shape of what is drawn."""
    import scvi.nn._base_components as components
    from scvi.distributions import Normal

    by_shape = {tuple(value.shape): value for value in noise.values()}

    class Fixed(Normal):
        def rsample(self, sample_shape: Any = ()) -> Any:
            return self.loc + self.scale * by_shape[tuple(self.loc.shape)]

    components.Normal = Fixed


def _forward(module: Any, tensors: dict[str, Any], labelled: dict[str, Any] | None) -> tuple[Any, Any, Any]:
    inference = module.inference(**module._get_inference_input(tensors))
    generative = module.generative(**module._get_generative_input(tensors, inference))
    options: dict[str, Any] = {"kl_weight": KL_WEIGHT}
    if labelled is not None:
        options |= {"labelled_tensors": labelled, "classification_ratio": CLASSIFICATION_RATIO}
    return inference, generative, module.loss(tensors, inference, generative, **options)


def _terms(inference: Any, generative: Any, losses: Any) -> dict[str, Any]:
    if losses.classification_loss is None:
        return _outputs(inference, generative, losses)
    return {
        "qz_loc": inference["qz"].loc,
        "qz_scale": inference["qz"].scale,
        "log_library": inference["library"],
        "rho": generative["px"].scale,
        "reconstruction": losses.reconstruction_loss["reconstruction_loss"],
        "kl": losses.kl_local["kl_local"],
        "classification": losses.classification_loss,
        "total": losses.loss,
    }


def build(case: dict[str, Any], data: Arrays, rng: np.random.Generator) -> Arrays:
    """Every array of a case: ``weights/`` and ``eval/``; for a training case two more groups."""
    import scvi
    import torch

    adata = _anndata(data)
    peer = getattr(scvi.model, case["model"])
    peer.setup_anndata(adata, **case["setup"])
    model = peer(adata, n_hidden=N_HIDDEN, n_latent=N_LATENT, dropout_rate=0.0, **case["init"])
    module = model.module
    _randomise(module, rng)
    if case["model"] == "SCANVI":
        module.y_prior.data.copy_(torch.tensor([[0.5, 0.3, 0.2]]))
    arrays = {f"weights/{name}": value.clone() for name, value in module.state_dict().items()}
    tensors = _minibatch(model)
    labelled = None
    if case["model"] == "SCANVI":
        known = torch.tensor(data["donor"] < N_KNOWN)
        labelled = {key: value[known] for key, value in tensors.items() if value is not None}
    names = ("z_epsilon", "library_epsilon", "z2_epsilon")
    noise = {key: torch.tensor(data[key], dtype=torch.float32) for key in names}
    # A draw for the labelled cells is made and not looked at.
    n = int((data["donor"] < N_KNOWN).sum())
    unseen = {"z_unseen": torch.zeros(n, N_LATENT), "l_unseen": torch.zeros(n, 1)}
    module.eval()
    _fix_draws({key: torch.zeros_like(value) for key, value in (noise | unseen).items()})
    with torch.no_grad():
        out = _terms(*_forward(module, tensors, labelled))
        if labelled is not None:
            inputs = module._get_inference_input(tensors)
            out["class_logits"] = module.classify(
                **{k: inputs[k] for k in ("x", "batch_index", "cont_covs", "cat_covs")}
            )
        else:
            out["loadings"] = torch.tensor(model.get_loadings().to_numpy().copy())
    arrays |= {f"eval/{name}": value for name, value in out.items()}
    if case["train"]:
        module.train()
        _fix_draws(noise | unseen)
        terms = _forward(module, tensors, labelled)
        terms[2].loss.backward()
        arrays |= {f"train/{name}": value.detach() for name, value in _terms(*terms).items()}
        for name, parameter in module.named_parameters():
            if parameter.grad is not None:
                arrays[f"gradient/{name}"] = parameter.grad
    arrays = {name: value.numpy().astype(np.float32) for name, value in arrays.items()}
    broken = [name for name, value in arrays.items() if not np.isfinite(value).all()]
    if broken:
        raise ValueError(f"{broken} have values that are not finite; the weights are drawn too wide")
    return arrays


def main(out: Path) -> None:
    """Write ``scvi_tools_family.json`` and ``scvi_tools_family.npz`` into ``out``."""
    import scvi
    import torch

    torch.set_num_threads(1)
    data = {key: value.astype(np.float32) for key, value in cells().items()}
    rng = np.random.default_rng(20240102)
    data["z2_epsilon"] = rng.normal(0, 1, (N_KNOWN * N_OBS, N_LATENT)).astype(np.float32)
    numbers = {"data": data}
    for i, (name, case) in enumerate(cases().items()):
        numbers[name] = build(case, data, np.random.default_rng([8, i]))
        print(f"{name}: total {float(numbers[name]['eval/total']):.4f} nats a cell", flush=True)
    layout = {
        name: [[key, list(value.shape)] for key, value in arrays.items()] for name, arrays in numbers.items()
    }
    flat = {name: np.concatenate([v.ravel() for v in arrays.values()]) for name, arrays in numbers.items()}
    packed = np.frombuffer(json.dumps(layout, separators=(",", ":")).encode(), dtype=np.uint8)
    np.savez_compressed(out / "scvi_tools_family.npz", layout=packed, **flat)
    about = {
        "made by": "benchmarks/peers/scvi_tools_family_fixtures.py",
        "scvi-tools": scvi.__version__,
        "torch": torch.__version__.split("+")[0],
        "kl_weight": KL_WEIGHT,
        "classification_ratio": CLASSIFICATION_RATIO,
        "n_known": N_KNOWN,
        "unlabeled_category": UNLABELED,
        "cases": cases(),
    }
    (out / "scvi_tools_family.json").write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m benchmarks.peers.scvi_tools_family_fixtures OUT_DIR")
    main(Path(sys.argv[1]))
