"""Models that scvi-tools saved: the same answers; and files that are not what they should be."""

import io
import os
import pickle
import shutil
import sys
import zipfile
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch

from atlasvi.cli import main
from atlasvi.errors import ModelError
from atlasvi.models import load
from atlasvi.models.convert import from_scvi_tools, to_scvi_tools
from atlasvi.models.pickled import read_pickled

FIXTURES = Path(__file__).parents[1] / "oracle" / "fixtures"
SAVED = FIXTURES / "saved"
SAID = np.load(SAVED / "said.npz")
NAMES = ["scvi", "scanvi", "linear"]
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
SIZES = {"batch": 3, "label": 2, "donor": 4, "kit": 2}


@pytest.fixture(scope="module")
def cells():
    """The cells of `benchmarks.peers.scvi_tools_fixtures`, under the names that are used there."""
    with np.load(FIXTURES / "scvi_tools.npz") as file:
        import json

        flat, at, data = file["data"], 0, {}
        for name, shape in json.loads(file["layout"].tobytes())["data"]:
            n = int(np.prod(shape))
            data[name], at = flat[at : at + n].reshape(shape), at + n
    obs = pd.DataFrame(index=[f"cell{i}" for i in range(len(data["counts"]))])
    for key, n in SIZES.items():
        obs[key] = pd.Categorical.from_codes(data[key].astype(int), [f"{key}{i}" for i in range(n)])
    for key in ("age", "mito"):
        obs[key] = data[key]
    var = pd.DataFrame(index=[f"gene{i}" for i in range(data["counts"].shape[1])])
    return anndata.AnnData(sp.csr_matrix(data["counts"]), obs, var)


def rho_at_the_mean(model, cells):
    minibatch = next(model._minibatches(cells, None, None))
    with torch.no_grad():
        return model.module.decode_log_rho(model.module.encode(minibatch).loc, minibatch).exp().numpy()


@pytest.mark.parametrize("name", NAMES)
def test_it_says_what_scvi_tools_said(name, cells, tmp_path):
    model = from_scvi_tools(SAVED / name)
    model.save(tmp_path / "m")
    for one in (model, load(tmp_path / "m")):
        assert one.is_trained
        assert "trained by scvi-tools 1.4.2" in repr(one)
        np.testing.assert_allclose(one.get_latent_representation(cells), SAID[f"{name}/latent"], **CLOSE)
        np.testing.assert_allclose(rho_at_the_mean(one, cells), SAID[f"{name}/rho"], **CLOSE)
        np.testing.assert_allclose(one.expression(cells)[:5].compute().sum(1), 1, rtol=1e-5)


def test_labels_are_as_scvi_tools_has_them(cells):
    model = from_scvi_tools(SAVED / "scanvi", cells)
    soft = model.predict(soft=True)
    assert list(soft.columns) == list(SAID["scanvi/labels"])
    np.testing.assert_allclose(soft, SAID["scanvi/probabilities"], **CLOSE)
    assert model.fields.unlabeled_category == "donor3"
    known = cells.obs["donor"] != "donor3"
    assert (model._codes.labels[~known] == 3).all()


def test_a_converted_model_can_be_trained_on(cells):
    model = from_scvi_tools(SAVED / "scvi", cells)
    model.train(1, enable_progress_bar=False)
    assert len(model.records) == 1


@pytest.mark.parametrize("options", [{}, {"gene_likelihood": "poisson"}, {"dispersion": "gene-cell"},
    {"dispersion": "gene-batch", "use_observed_lib_size": False}], ids=str)  # fmt: skip
def test_there_and_back_nothing_is_lost(options, adata, tmp_path):
    from atlasvi.models.scvi import SCVI

    SCVI.setup_anndata(
        adata, batch_key="batch", categorical_covariate_keys=["donor"], continuous_covariate_keys=["age"],
        gene_mask=None,
    )  # fmt: skip
    model = SCVI(adata, n_hidden=16, n_latent=3, **options)
    model.train(1, enable_progress_bar=False)
    to_scvi_tools(model, tmp_path / "theirs")
    again = from_scvi_tools(tmp_path / "theirs", adata)
    assert again.config == model.config
    assert again.fields == model.fields
    for name, value in model.module.state_dict().items():
        assert torch.equal(value, again.module.state_dict()[name]), name
    with pytest.raises(ModelError, match="already"):
        to_scvi_tools(model, tmp_path / "theirs")
    to_scvi_tools(model, tmp_path / "theirs", overwrite=True)


def test_what_is_written_has_every_weight_that_scvi_tools_wrote(tmp_path):
    """Read by scvi-tools itself: `python -m benchmarks.peers.scvi_tools_saved read`."""
    to_scvi_tools(from_scvi_tools(SAVED / "scvi"), tmp_path / "m")
    ours, theirs = (
        read_pickled(f / "model.pt")["model_state_dict"] for f in (tmp_path / "m", SAVED / "scvi")
    )
    theirs.pop("pyro_param_store")
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert ours[name].shape == value.shape, name
        # nb: heads of dropout and of a cell's own dispersion, and the library's encoder, say nothing.
        if not name.startswith(("l_encoder", "decoder.px_dropout", "decoder.px_r")):
            assert torch.equal(ours[name], value), name


LEVELS = {
    "integers": ([10, 2, 1], [1, 2, 10], np.int64),
    "fractions": ([0.5, 2.0], [0.5, 2.0], np.float64),
    "true and false": ([True, False], [False, True], np.bool_),
    "categories": (pd.Categorical([2, 0, 1], [2, 0, 1]), [2, 0, 1], np.int64),
    "text": (["1", "0"], ["0", "1"], np.object_),
}


@pytest.mark.parametrize(("values", "expected", "dtype"), LEVELS.values(), ids=LEVELS)
def test_levels_are_written_with_the_type_they_have_in_obs(values, expected, dtype, adata, tmp_path):
    """scvi-tools compares the levels with those of obs; where no column was named they are its zeros."""
    from atlasvi.models.scvi import SCVI

    for key in ("batch", "donor"):
        adata.obs[key] = pd.Series(values).take(np.arange(adata.n_obs) % len(values)).array
    SCVI.setup_anndata(adata, batch_key="batch", categorical_covariate_keys=["donor"], gene_mask=None)
    model = SCVI(adata, n_hidden=16, n_latent=3)
    model.train(1, enable_progress_bar=False)
    model.save(tmp_path / "m")
    to_scvi_tools(load(tmp_path / "m"), tmp_path / "theirs")
    content = read_pickled(tmp_path / "theirs" / "model.pt")
    of = {
        name: field["state_registry"]
        for name, field in content["attr_dict"]["registry_"]["field_registries"].items()
    }
    for levels in (of["batch"]["categorical_mapping"], of["extra_categorical_covs"]["mappings"]["donor"]):
        assert levels.dtype == dtype
        assert levels.tolist() == expected
    labels = of["labels"]["categorical_mapping"]
    assert (labels.dtype, labels.tolist()) == (np.int64, [0])
    assert from_scvi_tools(tmp_path / "theirs", adata).fields == model.fields


def test_the_command_converts_both_ways(tmp_path, monkeypatch, capsys):
    for source, out in ((SAVED / "scvi", "m"), (tmp_path / "m", "theirs")):
        monkeypatch.setattr(sys, "argv", ["atlasvi", "convert", str(source), "-o", str(tmp_path / out)])
        with pytest.raises(SystemExit) as end:
            main()
        assert end.value.code == 0
    assert "trained by scvi-tools 1.4.2" in capsys.readouterr().out
    assert (tmp_path / "theirs" / "model.pt").is_file()


class Evil:
    def __reduce__(self):
        return os.system, ("touch hostile",)


def hostile(path, content):
    """A file as torch.save makes them, with a pickle of our own inside."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/data.pkl", content)
        archive.writestr("model/version", "3\n")


def stacked(*parts):
    return b"\x80\x02" + b"".join(parts) + b"."


HOSTILE = {
    "a call": (pickle.dumps({"attr_dict": Evil()}), "system"),
    "eval": (
        stacked(b"cbuiltins\neval\n", b"X\x1d\x00\x00\x00open('hostile', 'w').close() ", b"\x85R"),
        "builtins.eval",
    ),
    "getattr": (stacked(b"cbuiltins\ngetattr\n"), "builtins.getattr"),
    "by way of what is allowed": (stacked(b"cnumpy\nndarray.tofile\n"), "numpy.ndarray.tofile"),
    "torch.load": (stacked(b"ctorch\nload\n"), "torch.load"),
    "a class of our own": (stacked(b"catlasvi.models.scvi\nSCVI\n"), "atlasvi.models.scvi.SCVI"),
    "not a pickle": (b"\x00\x01\x02", "damaged"),
    "nothing": (b"", "damaged"),
    "another thing": (pickle.dumps([1, 2]), "not a model"),
}


@pytest.mark.parametrize(("content", "said"), HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_file_is_refused_by_name_and_nothing_of_it_is_run(content, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hostile(tmp_path / "model.pt", content)
    with pytest.raises(ModelError, match=said) as raised:
        from_scvi_tools(tmp_path)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "hostile").exists()
    # Else the file would prove nothing: pickle itself runs it.
    if said in ("system", "builtins.eval"):
        pickle.loads(content)
        assert (tmp_path / "hostile").exists()


def test_a_tensor_that_reaches_outside_its_storage_is_refused(tmp_path):
    buffer = io.BytesIO()
    torch.save({"w": torch.arange(4.0)}, buffer)
    with zipfile.ZipFile(buffer) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    pkl = next(name for name in parts if name.endswith("data.pkl"))
    parts[pkl] = parts[pkl].replace(b"K\x04\x85", b"K\x40\x85")
    with zipfile.ZipFile(tmp_path / "model.pt", "w") as archive:
        for name, content in parts.items():
            archive.writestr(name, content)
    with pytest.raises(ModelError, match="damaged"):
        read_pickled(tmp_path / "model.pt")


def test_what_cannot_be_is_refused(adata, tmp_path):
    with pytest.raises(ModelError, match=r"no model\.pt"):
        from_scvi_tools(tmp_path)
    content = read_pickled(SAVED / "scvi" / "model.pt")
    for change, said in (
        (lambda c: c["attr_dict"]["registry_"].update(model_name="TOTALVI"), "TOTALVI; SCVI, SCANVI"),
        (
            lambda c: c["attr_dict"]["init_params_"]["non_kwargs"].update(batch_representation="embedding"),
            "embedding",
        ),
        (lambda c: c["attr_dict"]["init_params_"]["non_kwargs"].update(n_hidden=9), "size mismatch"),
        (lambda c: c.pop("var_names"), "var_names"),
        (lambda c: c["attr_dict"].update(is_trained_=False), "saved before it was trained"),
    ):
        content = read_pickled(SAVED / "scvi" / "model.pt")
        content["model_state_dict"].pop("pyro_param_store")
        del content["attr_dict"]["history_"]
        change(content)
        torch.save(content, tmp_path / "model.pt")
        with pytest.raises(ModelError, match=said):
            from_scvi_tools(tmp_path)
    from atlasvi.models.ldvae import LinearSCVI
    from atlasvi.models.scvi import SCVI

    LinearSCVI.setup_anndata(adata, gene_mask=None)
    with pytest.raises(ModelError, match="LinearSCVI"):
        to_scvi_tools(LinearSCVI(adata), tmp_path / "x")
    SCVI.setup_anndata(adata, gene_mask=None)
    model = SCVI(adata, n_hidden=16, n_latent=3)
    model.train(1, enable_progress_bar=False)
    with pytest.raises(ModelError, match="is a file; name a folder"):
        to_scvi_tools(model, tmp_path / "model.pt", overwrite=True)
    (tmp_path / "empty").mkdir()
    to_scvi_tools(model, tmp_path / "empty")
    with pytest.raises(ModelError, match="there is a"):
        to_scvi_tools(model, tmp_path / "empty")


def test_a_prefix_that_it_was_saved_with_is_no_matter(tmp_path):
    """`save(prefix="x_")` of scvi-tools writes x_model.pt."""
    shutil.copy(SAVED / "scvi" / "model.pt", tmp_path / "x_model.pt")
    found, expected = from_scvi_tools(tmp_path), from_scvi_tools(SAVED / "scvi")
    for name, weight in expected.module.state_dict().items():
        assert torch.equal(found.module.state_dict()[name], weight), name
    shutil.copy(SAVED / "scvi" / "model.pt", tmp_path / "y_model.pt")
    with pytest.raises(ModelError, match=r"several models, x_model\.pt, y_model\.pt"):
        from_scvi_tools(tmp_path)
    assert from_scvi_tools(tmp_path / "y_model.pt").is_trained
