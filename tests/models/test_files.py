"""Model folders: what is written comes back, what is not a model is refused, nothing is half-written."""

import json
import pickletools

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file

import atlasvi.models.folder as folder
from atlasvi.errors import ModelError, OptionError, SpaceError, StoreError, VersionError
from atlasvi.models.scvi import SCVI


def build(adata, **options):
    SCVI.setup_anndata(
        adata, batch_key="batch", labels_key="cell_type", categorical_covariate_keys=["donor"],
        continuous_covariate_keys=["age"], gene_mask=None,
    )  # fmt: skip
    model = SCVI(adata, n_hidden=16, n_latent=3, **options)
    model.train(2, batch_size=64, enable_progress_bar=False, plan_kwargs={"lr": 0.01})
    return model


@pytest.fixture
def model(adata):
    return build(adata)


@pytest.fixture
def saved(model, tmp_path):
    model.save(tmp_path / "model")
    return tmp_path / "model"


def answers(model, data=None):
    yield model.get_latent_representation(data)
    yield model.get_latent_representation(data, give_mean=False, seed=2)
    yield from model.get_latent_representation(data, return_dist=True)
    yield model.get_elbo(data, return_mean=False)
    yield model.get_reconstruction_error(data, return_mean=False)["reconstruction_loss"]
    yield model.expression(data).compute()
    how = {"transform_batch": "b2", "library_size": "latent", "n_samples": 2}
    yield model.get_normalized_expression(data, **how).to_numpy()


def snapshot(folder):
    return {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_observed_lib_size": False, "encode_covariates": True},
        {"gene_likelihood": "nb", "dispersion": "gene-label", "n_layers": 2},
        {"gene_likelihood": "zip", "use_layer_norm": "both", "use_batch_norm": "none"},
        {"dispersion": "gene-cell", "deeply_inject_covariates": False},
    ],
)
def test_a_model_that_was_read_answers_the_same_bit_by_bit(options, adata, tmp_path):
    model = build(adata, **options)
    model.save(tmp_path / "model")
    loaded = SCVI.load(tmp_path / "model", adata)
    assert loaded.config == model.config
    assert loaded.fields == model.fields
    assert loaded.records == model.records
    for mine, theirs in zip(answers(model), answers(loaded), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    np.testing.assert_array_equal(loaded.validation_indices, model.validation_indices)
    assert loaded.module.state_dict().keys() == model.module.state_dict().keys()


def test_a_model_needs_no_data_to_be_read_but_to_answer(saved, adata, model):
    loaded = SCVI.load(saved)
    with pytest.raises(OptionError, match="loaded without data"):
        loaded.get_latent_representation()
    np.testing.assert_array_equal(loaded.get_latent_representation(adata), model.get_latent_representation())


def test_a_model_that_was_read_can_be_trained_on(saved, adata):
    loaded = SCVI.load(saved, adata)
    before = loaded.module.state_dict()["decoder.scale.bias"].clone()
    loaded.train(1, enable_progress_bar=False)
    assert not torch.equal(before, loaded.module.state_dict()["decoder.scale.bias"])


def test_the_folder_is_safetensors_and_json_and_nothing_else(saved, model):
    assert sorted(p.name for p in saved.iterdir()) == ["model.json", "weights.safetensors"]
    description = json.loads((saved / "model.json").read_text())
    assert description["model"] == "SCVI"
    assert description["fields"]["var_names"] == list(model.fields.var_names)
    arrays = load_file(saved / "weights.safetensors")
    for name, value in model.module.state_dict().items():
        np.testing.assert_array_equal(arrays[name], value.numpy())
    for file in saved.iterdir():
        with pytest.raises(Exception, match=r".*"):
            list(pickletools.genops(file.read_bytes()))


def test_saving_twice_writes_the_same_bytes(saved, model, tmp_path):
    model.save(tmp_path / "again")
    assert snapshot(saved) == snapshot(tmp_path / "again")


def test_options_may_be_numbers_of_numpys(adata, tmp_path):
    SCVI.setup_anndata(adata, batch_key="batch", gene_mask=None)
    whole, share = np.int64, np.float32
    how = {"enable_progress_bar": False, "checkpoint": tmp_path / "run", "checkpoint_every_seconds": 0}
    how |= {"plan_kwargs": {"lr": share(0.01)}, "train_size": share(0.8), "seed": whole(1)}
    model = SCVI(adata, n_hidden=whole(16), n_latent=whole(3), dropout_rate=share(0.1))
    model.train(whole(1), batch_size=whole(64), **how)
    model.train(whole(2), batch_size=whole(64), resume=True, **how)
    model.save(tmp_path / "model")
    loaded = SCVI.load(tmp_path / "model", adata)
    assert type(loaded.config.n_latent) is int and loaded.config == model.config
    assert loaded.plan == model.plan
    np.testing.assert_array_equal(loaded.validation_indices, model.validation_indices)


# --- what is not written over -------------------------------------------------------------------


def test_a_model_is_not_overwritten_unless_asked(saved, model):
    before = snapshot(saved)
    with pytest.raises(ModelError, match="overwrite=True"):
        model.save(saved)
    assert snapshot(saved) == before
    model.train(1, enable_progress_bar=False)
    model.save(saved, overwrite=True)
    assert len(SCVI.load(saved).records) == 1


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_of_other_things_is_not_written_to(overwrite, model, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ModelError, match=r"thesis\.tex"):
        model.save(tmp_path, overwrite=overwrite)
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match="is a file"):
        model.save(tmp_path / "file", overwrite=overwrite)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_checkpoint_and_log_stay(saved, model):
    (saved / "checkpoint").mkdir()
    (saved / "checkpoint" / "state.json").write_text("{}")
    (saved / "history.csv").write_text("epoch\n")
    model.save(saved, overwrite=True)
    assert (saved / "checkpoint" / "state.json").read_text() == "{}"
    assert (saved / "history.csv").read_text() == "epoch\n"


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(5, "I/O error"), MemoryError])
def test_a_save_that_is_cut_off_leaves_the_old_model_whole(error, saved, model, monkeypatch):
    before = snapshot(saved)

    def half(tensors, path):
        path.write_bytes(b"half")
        raise error

    monkeypatch.setattr(folder, "save_tensors", half)
    with pytest.raises(BaseException) as raised:
        model.save(saved, overwrite=True)
    assert not isinstance(raised.value, AssertionError)
    assert snapshot(saved) == before
    assert [p.name for p in saved.parent.iterdir()] == ["model"]


def test_a_first_save_that_is_cut_off_leaves_nothing(model, tmp_path, monkeypatch):
    monkeypatch.setattr(folder, "versions", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.save(tmp_path / "new")
    assert not list(tmp_path.iterdir())


def test_a_kill_between_the_two_renames_leaves_the_old_model(saved, model):
    before = snapshot(saved)
    saved.rename(saved.with_name(".model.old"))
    (saved.with_name(".model.new")).mkdir()
    assert SCVI.load(saved).fields == model.fields
    assert snapshot(saved) == before


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        # What safetensors says of a full disk.
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_named_and_leaves_nothing(error, model, tmp_path, monkeypatch):
    def full(tensors, path):
        raise error

    monkeypatch.setattr(folder, "save_tensors", full)
    with pytest.raises(SpaceError, match="no space left"):
        model.save(tmp_path / "new")
    assert not list(tmp_path.iterdir())


# --- what is not a model ------------------------------------------------------------------------


def edit(folder, **changes):
    path = folder / "model.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def truncate(path):
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])


DAMAGES = {
    "another folder": (lambda f: (f / "model.json").unlink(), ModelError, "not a model folder"),
    "truncated weights": (lambda f: truncate(f / "weights.safetensors"), ModelError, "weights.safetensors"),
    "no weights": (lambda f: (f / "weights.safetensors").unlink(), ModelError, "weights.safetensors"),
    "truncated description": (lambda f: truncate(f / "model.json"), ModelError, "damaged"),
    "a list": (lambda f: (f / "model.json").write_text("[]"), ModelError, "damaged"),
    "an option gone": (lambda f: edit(f, config={"n_hiden": 3}), ModelError, "n_hiden"),
    "an option wrong": (lambda f: edit(f, config={"dispersion": "none"}), ModelError, "'none'"),
    "other sizes": (lambda f: edit(f, config={"n_hidden": 9}), ModelError, "weights"),
    "no fields": (lambda f: edit(f, fields={}), ModelError, "damaged"),
    "another class": (lambda f: edit(f, model="SCANVI"), ModelError, "is a SCANVI, not a SCVI"),
    "newer": (lambda f: edit(f, format=2, versions={"atlasvi": "9.1"}), VersionError, r"9\.1.*pip install"),
}


@pytest.mark.parametrize(("damage", "kind", "words"), DAMAGES.values(), ids=DAMAGES)
def test_what_is_not_a_whole_model_is_one_error(damage, kind, words, saved):
    damage(saved)
    with pytest.raises(kind, match=words) as raised:
        SCVI.load(saved)
    assert str(saved) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_no_folder_is_no_model(tmp_path):
    with pytest.raises(ModelError, match="not a model folder"):
        SCVI.load(tmp_path / "nothing")
    assert not list(tmp_path.iterdir())


def test_a_run_that_has_not_finished_says_how_to_go_on(tmp_path, adata):
    SCVI.setup_anndata(adata, gene_mask=None)
    SCVI(adata, n_hidden=8).train(1, checkpoint=tmp_path / "m" / "checkpoint", enable_progress_bar=False)
    with pytest.raises(ModelError, match="--resume"):
        SCVI.load(tmp_path / "m")


def test_a_link_stays_and_what_it_names_is_replaced(model, tmp_path):
    model.save(tmp_path / "disk")
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    before = (tmp_path / "disk" / "model.json").read_bytes()
    for n in (1, 2):
        model.origin = f"run {n}"
        model.save(tmp_path / "link", overwrite=True)
        assert (tmp_path / "link").is_symlink()
        assert SCVI.load(tmp_path / "disk").origin == f"run {n}"
    assert (tmp_path / "disk" / "model.json").read_bytes() != before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "link"]


def test_the_folder_that_one_is_in_is_read_and_not_replaced(model, saved, monkeypatch, tmp_path):
    monkeypatch.chdir(saved)
    assert SCVI.load(".").config == model.config
    for place in (".", tmp_path, "/"):
        with pytest.raises(StoreError, match="the folder that you are in"):
            model.save(place, overwrite=True)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    with pytest.raises(StoreError, match="the folder that you are in"):
        model.train(1, checkpoint=".", enable_progress_bar=False)


def test_whoever_may_read_the_folder_may_read_the_weights(saved):
    modes = {file.stat().st_mode & 0o777 for file in saved.iterdir() if file.is_file()}
    assert modes == {saved.stat().st_mode & 0o666}
