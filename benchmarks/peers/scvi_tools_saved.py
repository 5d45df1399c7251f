"""Small models that scvi-tools saved, with what they say; and whether scvi-tools reads what atlasvi writes.

Run with the peer's Python (`scvi_tools_env.sh` makes it), from the root of the repository::

    DIR/bin/python -m benchmarks.peers.scvi_tools_saved write tests/oracle/fixtures/saved
    DIR/bin/python -m benchmarks.peers.scvi_tools_saved read FOLDER tests/oracle/fixtures/saved

`write` leaves a folder for each model, ``model.pt`` as scvi-tools' ``save`` writes it, and `said.npz`: means
of q(z|x), rho, and for SCANVI the probabilities of labels, of the cells of `scvi_tools_fixtures`. `read`
loads FOLDER, which `atlasvi convert` wrote from the model ``scvi`` among them, and compares.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers.scvi_tools_family_fixtures import COVARIATES
from benchmarks.peers.scvi_tools_fixtures import SIZE_FACTOR, _anndata, _randomise, cells

_SETUP = {key: value for key, value in SIZE_FACTOR.items() if key != "size_factor_key"}
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "scvi": ("SCVI", _SETUP, {"n_layers": 2, "encode_covariates": True, "gene_likelihood": "nb"}),
    "scanvi": ("SCANVI", COVARIATES, {}),
    "linear": ("LinearSCVI", {"batch_key": "batch"}, {}),
}


def write(out: Path) -> None:
    """Train each model for an epoch, draw its weights at random, save it, and write down what it says."""
    import scvi

    said: dict[str, Any] = {}
    data = {key: value.astype(np.float32) for key, value in cells().items()}
    for i, (name, (kind, setup, init)) in enumerate(MODELS.items()):
        adata = _anndata(data)
        peer = getattr(scvi.model, kind)
        peer.setup_anndata(adata, **setup)
        model = peer(adata, n_hidden=8, n_latent=3, **init)
        model.train(1, accelerator="cpu", enable_progress_bar=False)
        prior = model.module.state_dict().get("y_prior")
        _randomise(model.module, np.random.default_rng([9, i]))
        if prior is not None:
            model.module.y_prior.data.fill_(1 / prior.shape[1])
        model.module.eval()
        model.save(str(out / name), overwrite=True)
        said[f"{name}/latent"] = model.get_latent_representation()
        said[f"{name}/rho"] = _rho(model, adata)
        if kind == "SCANVI":
            soft = model.predict(soft=True)
            said[f"{name}/probabilities"] = soft.to_numpy(dtype=np.float32)
            said[f"{name}/labels"] = np.array(list(soft.columns))
    np.savez_compressed(out / "said.npz", **said)


def _rho(model: Any, adata: Any) -> np.ndarray:
    """Rho at the mean of q(z|x), which ``get_normalized_expression`` would draw from."""
    import torch

    (tensors,) = list(model._make_data_loader(adata=adata, batch_size=adata.n_obs, shuffle=False))
    module = model.module
    with torch.no_grad():
        inference = module.inference(**module._get_inference_input(tensors))
        inference["z"] = inference["qz"].loc
        generative = module.generative(**module._get_generative_input(tensors, inference))
    return generative["px"].scale.numpy()


def read(folder: Path, fixtures: Path) -> None:
    """Have scvi-tools load what atlasvi wrote, and hold it against what the model said at first."""
    import scvi

    data = {key: value.astype(np.float32) for key, value in cells().items()}
    adata = _anndata(data)
    model = scvi.model.SCVI.load(str(folder), adata)
    model.module.eval()
    said = np.load(fixtures / "said.npz")
    for name, value in (("latent", model.get_latent_representation()), ("rho", _rho(model, adata))):
        print(f"{name}: largest difference {np.abs(value - said[f'scvi/{name}']).max():.2e}")
        np.testing.assert_allclose(value, said[f"scvi/{name}"], rtol=1e-5, atol=1e-6)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    if sys.argv[1:2] == ["write"] and len(sys.argv) == 3:
        write(Path(sys.argv[2]))
    elif sys.argv[1:2] == ["read"] and len(sys.argv) == 4:
        read(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        sys.exit("usage: python -m benchmarks.peers.scvi_tools_saved write OUT | read FOLDER FIXTURES")
