"""What every model of the family does: trained from an AnnData and from a store, saved, loaded, resumed."""

import copy
import sys

import numpy as np
import pytest
import torch

import atlasvi
from atlasvi.cli import main
from atlasvi.errors import ModelError, OptionError
from atlasvi.models import by_name, load
from atlasvi.models.factor import FactorModel

# Name in lower case, and what it is with -> columns to set up, arguments.
SETUP = {"batch_key": "batch", "gene_mask": None}
FAMILY = {
    "scvi": (SETUP, {"n_hidden": 16, "n_latent": 3}),
    "scvi mog": (SETUP, {"n_hidden": 16, "n_latent": 3, "prior": "mog", "n_prior_components": 4}),
    "scvi vamp": (SETUP, {"n_hidden": 16, "n_latent": 3, "prior": "vamp", "n_prior_components": 4}),
    "linearscvi": (SETUP, {"n_hidden": 16, "n_latent": 3}),
    "scanvi": (
        {**SETUP, "labels_key": "cell_type", "unlabeled_category": "NK"},
        {"n_hidden": 16, "n_latent": 3},
    ),
    "scvae": (SETUP, {"n_hidden": 16, "n_latent": 3, "mean": "exp"}),
    "gmvae": (SETUP, {"n_hidden": 16, "n_latent": 3, "n_components": 3, "bound": "sampled"}),
    "gaussianvae": (SETUP, {"n_hidden": 16, "n_latent": 3}),
    "dca": ({"gene_mask": None}, {"n_hidden": 16, "n_latent": 4}),
    "actinn": ({"labels_key": "cell_type", "gene_mask": None}, {"transform": "lecture"}),
    "pca": ({"gene_mask": None}, {"n_latent": 3}),
    "ppca": ({"gene_mask": None}, {"n_latent": 3}),
    "factoranalysis": ({"gene_mask": None}, {"n_latent": 3}),
}


def kind_of(name):
    return by_name(name.split()[0])


FACTORS = [name for name in FAMILY if issubclass(kind_of(name), FactorModel)]
TRAINED = [name for name in FAMILY if name not in FACTORS]


def build(name, data):
    setup, options = FAMILY[name]
    kind = kind_of(name)
    kind.setup_anndata(data, **setup)
    return kind(data, **options)


def train(model, max_epochs=2, **options):
    model.train(max_epochs, **{"batch_size": 64, "enable_progress_bar": False, **options})
    return model


def answer(model, data=None):
    """What is asked of this model: latents, or probabilities where it has no latent."""
    if isinstance(model, atlasvi.ACTINN):
        return model.predict(data, soft=True).to_numpy()
    return model.get_latent_representation(data)


def on_command_line(name, store, out, monkeypatch, *more):
    setup, options = FAMILY[name]
    words = ["atlasvi", "train", str(store), "-o", str(out), "--model", name.split()[0]]
    for key, value in setup.items():
        words += [f"--{key.replace('_', '-')}", "none" if value is None else str(value)]
    for key, value in options.items():
        words += ["--option", f"{key}={value}"]
    monkeypatch.setattr(sys, "argv", [*words, *more])
    main()


@pytest.mark.parametrize("name", TRAINED)
def test_it_learns_and_is_the_same_after_saving_and_loading(name, adata, tmp_path):
    model = train(build(name, adata), 6, plan_kwargs={"lr": 0.01})
    loss = model.history["reconstruction_loss_validation"]["reconstruction_loss_validation"].to_numpy()
    assert np.isfinite(loss).all()
    assert loss[-1] < loss[0]
    model.save(tmp_path / "m")
    for again in (type(model).load(tmp_path / "m"), load(tmp_path / "m")):
        assert type(again) is type(model)
        assert again.config == model.config
        np.testing.assert_array_equal(answer(again, adata), answer(model))


@pytest.mark.parametrize("name", FAMILY)
def test_a_deep_copy_has_weights_of_its_own_and_the_same_counts(name, adata):
    model = build(name, adata)
    model.train(**({} if name in FACTORS else {"max_epochs": 1}), enable_progress_bar=False)
    before = answer(model)
    again = copy.deepcopy(model)
    np.testing.assert_array_equal(answer(again), before)
    assert again.atlas is not model.atlas
    assert again.atlas._source is model.atlas._source
    with torch.no_grad():
        for value in again.module.state_dict().values():
            value.zero_()
    np.testing.assert_array_equal(answer(model), before)


@pytest.mark.parametrize("name", TRAINED)
def test_the_command_trains_it_from_a_store_to_the_same_weights(name, small_store, tmp_path, monkeypatch):
    epochs = ["--max-epochs", "2", "--batch-size", "64"]
    with pytest.raises(SystemExit) as end:
        on_command_line(name, small_store, tmp_path / "m", monkeypatch, *epochs)
    assert end.value.code == 0
    from_command = load(tmp_path / "m", small_store)
    with atlasvi.open(small_store) as atlas:
        here = train(build(name, atlas))
        np.testing.assert_array_equal(answer(from_command), answer(here))


@pytest.mark.parametrize("name", FACTORS)
def test_the_command_fits_a_factor_model_and_writes_its_latents(name, adata, tmp_path, monkeypatch, capsys):
    store = tmp_path / "atlas.zarr"
    atlasvi.ingest(adata, store)
    with pytest.raises(SystemExit) as end:
        on_command_line(name, store, tmp_path / "m", monkeypatch)
    assert end.value.code == 0
    assert build(name, adata).loss_name in capsys.readouterr().out
    monkeypatch.setattr(
        sys, "argv", ["atlasvi", "latent", str(tmp_path / "m"), str(store), "--key", "X_mine"]
    )
    with pytest.raises(SystemExit):
        main()
    here = build(name, adata)
    here.train(enable_progress_bar=False)
    with atlasvi.open(store) as atlas:
        written = np.concatenate([block for block in load(tmp_path / "m", atlas).latent_blocks()])
    np.testing.assert_allclose(written, here.get_latent_representation(), rtol=1e-4, atol=1e-5)


def test_an_option_that_a_factor_model_has_no_use_for_is_refused(small_store, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit) as end:
        on_command_line("pca", small_store, tmp_path / "m", monkeypatch, "--lr", "0.1")
    assert end.value.code == 1
    assert "PCA has no use for --lr" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        on_command_line("gmvae", small_store, tmp_path / "m", monkeypatch, "--paper")
    assert "--paper is the setting of scvi, not of gmvae" in capsys.readouterr().err


@pytest.mark.parametrize("name", TRAINED)
def test_a_run_that_was_stopped_goes_on_to_the_same_weights(name, adata, tmp_path):
    whole = train(build(name, adata), 3)
    train(build(name, adata), 2, checkpoint=tmp_path / "c")
    resumed = train(build(name, adata), 3, checkpoint=tmp_path / "c", resume=True)
    for key, value in whole.module.state_dict().items():
        assert torch.equal(value, resumed.module.state_dict()[key]), key


def test_a_fit_by_passes_goes_on_from_the_command_line(small_store, tmp_path, monkeypatch, capsys):
    def factor_analysis(out, *more, code=0):
        with pytest.raises(SystemExit) as end:
            on_command_line("factoranalysis", small_store, tmp_path / out, monkeypatch, *more)
        assert end.value.code == code

    factor_analysis("whole", "--max-epochs", "8")
    factor_analysis("few", "--max-epochs", "3")
    factor_analysis("few", "--max-epochs", "8", code=1)
    assert "--resume" in capsys.readouterr().err
    factor_analysis("few", "--max-epochs", "8", "--resume")
    whole, resumed = (tmp_path / name for name in ("whole", "few"))
    assert (whole / "weights.safetensors").read_bytes() == (resumed / "weights.safetensors").read_bytes()
    assert len((resumed / "history.csv").read_text().splitlines()) == 1 + 8


@pytest.mark.parametrize("name", TRAINED)
def test_answers_do_not_depend_on_how_cells_are_cut(name, adata):
    model = train(build(name, adata), 1)
    np.testing.assert_allclose(answer(model, adata)[5:25], answer(model, adata[5:25].copy()), atol=1e-5)


def test_a_model_that_is_not_known_is_named_with_those_that_are(tmp_path):
    with pytest.raises(OptionError, match=r"'nosuch'.*scvi, scanvi, linearscvi"):
        by_name("nosuch")
    with pytest.raises(ModelError, match="not a model folder"):
        load(tmp_path)


WRONG = {
    "no value": (["--option", "n_latent"], "NAME=VALUE"),
    "no such argument": (["--option", "n_latents=3"], "no argument 'n_latents'; it has n_hidden"),
    "not a number": (["--option", "n_latent=x"], "a whole number"),
    "not a switch": (["--option", "bias=maybe"], "true or false"),
}


@pytest.mark.parametrize(("words", "said"), WRONG.values(), ids=WRONG)
def test_an_option_that_is_wrong_is_said_in_a_line(words, said, small_store, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit) as end:
        on_command_line("linearscvi", small_store, tmp_path / "m", monkeypatch, *words)
    assert end.value.code == 1
    assert said in capsys.readouterr().err
