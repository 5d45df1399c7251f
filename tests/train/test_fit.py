"""The training loop: the same weights whatever happens on the way, and no bad ones."""

import json
import shutil

import numpy as np
import pytest
import torch

from atlasvi.errors import ModelError, NotTrainedError, OptionError, TrainingError, VersionError
from atlasvi.models import base
from atlasvi.models.scvi import SCVI
from atlasvi.stream import Room
from atlasvi.stream.on_device import OnDevice
from atlasvi.train.average import floating_state
from atlasvi.train.history import CsvLog

EPOCHS = 4


@pytest.fixture
def make(adata):
    """A small untrained model; the options are those of `SCVI`."""

    def build(**options):
        SCVI.setup_anndata(adata, batch_key="batch", gene_mask=None)
        return SCVI(adata, n_hidden=16, n_latent=3, **options)

    return build


def train(model, max_epochs=EPOCHS, **options):
    model.train(max_epochs, batch_size=64, enable_progress_bar=False, **options)
    return model


def weights(model):
    return {name: value.clone() for name, value in model.module.state_dict().items()}


def assert_same(one, other):
    one, other = (w if isinstance(w, dict) else weights(w) for w in (one, other))
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def assert_same_history(one, other):
    for name, frame in one.history.items():
        if name not in ("seconds", "cells_per_second"):
            assert frame.equals(other.history[name]), name
    looks = [model.validation_history.drop(columns="seconds") for model in (one, other)]
    assert looks[0].equals(looks[1])


class Killed(Exception):
    """Stands for a kill."""


def kill_at(epoch, then=None):
    def on_epoch(record):
        if then is not None:
            then(record)
        if record.epoch == epoch:
            raise Killed

    return on_epoch


# --- the same numbers ---------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_weights_bit_by_bit(make):
    one, other = train(make(), seed=3), train(make(), seed=3)
    assert_same(one, other)
    assert one.history["elbo_validation"].equals(other.history["elbo_validation"])


def test_another_seed_gives_other_weights(make):
    before, one, other = weights(make()), weights(train(make())), weights(train(make(), seed=1))
    name = "decoder.scale.weight"
    assert not torch.equal(one[name], other[name])
    assert not torch.equal(one[name], before[name])


def test_the_number_of_readers_does_not_matter(make):
    budget = 1 << 16  # several buffers, so that there is something to read ahead
    assert_same(
        train(make(), 2, num_workers=0, memory_budget=budget),
        train(make(), 2, num_workers=3, memory_budget=budget),
    )


def test_the_global_random_state_is_neither_used_nor_touched(make):
    torch.manual_seed(11)
    before = torch.random.get_rng_state()
    one = train(make(), 1)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(12)
    np.random.seed(5)
    assert_same(one, train(make(), 1))


def test_a_store_on_disk_and_the_same_in_memory_train_to_the_same_weights(adata, small_atlas, make):
    SCVI.setup_anndata(small_atlas, batch_key="batch", gene_mask=None)
    # Blocks are chosen by the bytes of a row, which differ; here one block holds all of them.
    assert_same(train(make(), 2), train(SCVI(small_atlas, n_hidden=16, n_latent=3), 2))


@pytest.mark.parametrize("schedule", ["adaptive", "scvi-tools"])
def test_counts_kept_on_the_device_train_to_the_same_weights(
    small_atlas, monkeypatch, tmp_path, capfd, schedule
):
    SCVI.setup_anndata(small_atlas, batch_key="batch", gene_mask=None)
    run = {"schedule": schedule, "num_workers": 0}

    def make():
        return SCVI(small_atlas, n_hidden=16, n_latent=3)

    fresh = train(make(), **run)
    rooms, taken, take = [], [], OnDevice.take

    def make_room(device, takes):
        rooms.append(Room(device, 1 << 30))
        return rooms[-1]

    def watched(self, starts, rows, **options):
        taken.append(len(rows))
        return take(self, starts, rows, **options)

    monkeypatch.setattr(base, "room_for_counts", make_room)
    monkeypatch.setattr(OnDevice, "take", watched)
    kept = make()
    kept.train(EPOCHS, batch_size=64, **run)
    assert "counts kept on cpu" in capfd.readouterr().err
    assert_same(fresh, kept)
    assert_same_history(fresh, kept)
    # All cells but in the first pass, which adaptive training has before the first epoch; and likewise looks.
    n_epochs, looks = EPOCHS - (schedule != "adaptive"), len(kept.validation_history) - 1
    assert sum(taken) == n_epochs * len(kept.train_indices) + looks * len(kept.validation_indices)
    assert len(rooms) == 1 and rooms[0].n_bytes < 1 << 30

    checkpoint = {"checkpoint": tmp_path / "run", "checkpoint_every_seconds": 0.0}
    with pytest.raises(Killed):
        train(make(), **run, **checkpoint, on_epoch=kill_at(2))
    assert_same(fresh, train(make(), **run, **checkpoint, resume=True))


# --- going on -----------------------------------------------------------------------------------

KINDS = {
    "plain": ({"dropout_rate": 0.0}, {}),
    "dropout and two layers": ({"dropout_rate": 0.3, "n_layers": 2}, {}),
    "latent library": ({"use_observed_lib_size": False, "encode_covariates": True}, {}),
    "gene-cell, AdamW": ({"dispersion": "gene-cell"}, {"plan_kwargs": {"optimizer": "AdamW"}}),
    "plateau": (
        {},
        {"plan_kwargs": {"reduce_lr_on_plateau": True, "lr_patience": 0, "lr_threshold": 1e9, "lr": 0.01}},
    ),
    "nothing held out": ({}, {"train_size": 1.0}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_was_killed_goes_on_to_the_weights_of_one_that_was_not(kind, make, tmp_path):
    options, how = KINDS[kind]
    whole = train(make(**options), **how)
    checkpoint = {"checkpoint": tmp_path / "run", "checkpoint_every_seconds": 0.0}
    with pytest.raises(Killed):
        train(make(**options), **how, **checkpoint, on_epoch=kill_at(2))
    resumed = train(make(**options), **how, **checkpoint, resume=True)
    assert_same(whole, resumed)
    assert_same_history(whole, resumed)


def test_a_run_can_be_killed_again_and_again(make, tmp_path):
    whole = train(make())
    checkpoint = {"checkpoint": tmp_path / "run", "checkpoint_every_seconds": 0.0}
    for epoch in range(1, EPOCHS):
        with pytest.raises(Killed):
            train(make(), **checkpoint, resume=epoch > 1, on_epoch=kill_at(epoch))
    assert_same(whole, train(make(), **checkpoint, resume=True))


def test_a_finished_run_goes_on_to_more_epochs(make, tmp_path):
    checkpoint = {"checkpoint": tmp_path / "run", "checkpoint_every_seconds": 1e9}
    train(make(), 2, **checkpoint)
    assert_same(train(make()), train(make(), EPOCHS, **checkpoint, resume=True))


def test_the_log_of_a_resumed_run_has_each_epoch_once(make, tmp_path):
    log = tmp_path / "history.csv"
    checkpoint = {"checkpoint": tmp_path / "run", "checkpoint_every_seconds": 0.0}
    with pytest.raises(Killed):
        train(make(), **checkpoint, on_epoch=kill_at(2, CsvLog(log)))
    train(make(), **checkpoint, resume=True, on_epoch=CsvLog(log, after=log))
    assert [line.split(",")[0] for line in log.read_text().splitlines()[1:]] == ["0", "1", "2", "3"]


@pytest.mark.parametrize(
    ("options", "how", "named"),
    [
        ({"n_hidden": 8}, {}, "config.n_hidden=16, now 8"),
        ({"dropout_rate": 0.5}, {}, "config.dropout_rate"),
        ({"seed": 5}, {}, "config.seed"),
        ({}, {"seed": 5}, "split.seed=0, now 5"),
        ({}, {"train_size": 0.5}, "split.train_size=0.9, now 0.5"),
        ({}, {"batch_size": 32}, "batch_size=64, now 32"),
        ({}, {"plan_kwargs": {"lr": 0.1}}, "plan.lr=0.01, now 0.1"),
        ({}, {"memory_budget": 1 << 16}, "memory_budget=None, now 65536"),
    ],
)
def test_other_options_refuse_to_go_on_and_name_the_one_that_differs(options, how, named, adata, tmp_path):
    SCVI.setup_anndata(adata, batch_key="batch", gene_mask=None)
    checkpoint = {"checkpoint": tmp_path / "run", "enable_progress_bar": False}
    SCVI(adata, n_hidden=16, n_latent=3).train(1, batch_size=64, **checkpoint)
    before = (tmp_path / "run" / "state.json").read_bytes()
    other = SCVI(adata, **{"n_hidden": 16, "n_latent": 3, **options})
    with pytest.raises(ModelError) as raised:
        other.train(2, **{"batch_size": 64, **how}, **checkpoint, resume=True)
    assert named in str(raised.value)
    assert "\n" not in str(raised.value)
    assert (tmp_path / "run" / "state.json").read_bytes() == before


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda adata: adata[::-1].copy(), "other cells, or of the same in another order"),
        (lambda adata: adata[: len(adata) - 1].copy(), "split.n_obs=300, now 299|other cells"),
        (lambda adata: with_batches(adata, adata.obs["batch"].to_numpy()[::-1]), "other batches"),
    ],
)
def test_other_cells_refuse_to_go_on(change, named, adata, tmp_path):
    checkpoint = {"checkpoint": tmp_path / "run", "enable_progress_bar": False}
    for data in (adata, change(adata)):
        SCVI.setup_anndata(data, batch_key="batch", gene_mask=None)
        model = SCVI(data, n_hidden=16)
        if data is adata:
            model.train(1, **checkpoint)
    with pytest.raises(ModelError, match=named):
        model.train(2, **checkpoint, resume=True)
    assert not model.is_trained


def with_batches(adata, batches):
    adata = adata.copy()
    adata.obs["batch"] = batches
    return adata


def test_a_resumption_that_is_refused_leaves_a_trained_model_as_it_was(make, tmp_path):
    model = train(make(), 2)
    history, held_out = model.history["elbo_train"], model.validation_indices
    with pytest.raises(ModelError, match="no checkpoint"):
        model.train(3, checkpoint=tmp_path / "none", resume=True, train_size=0.5, enable_progress_bar=False)
    assert model.is_trained
    assert model.history["elbo_train"].equals(history)
    assert model.validation_indices.tolist() == held_out.tolist()


def test_other_genes_refuse_to_go_on_without_listing_all_of_them(adata, tmp_path):
    checkpoint = {"checkpoint": tmp_path / "run", "enable_progress_bar": False}
    SCVI.setup_anndata(adata, gene_mask=None)
    SCVI(adata, n_hidden=16).train(1, **checkpoint)
    SCVI.setup_anndata(adata, gene_mask="highly_variable")
    with pytest.raises(ModelError, match=r"fields\.gene_mask=None, now 'highly_variable'") as raised:
        SCVI(adata, n_hidden=16).train(2, **checkpoint, resume=True)
    assert len(str(raised.value)) < 400


def test_without_a_checkpoint_there_is_nothing_to_go_on_with(make, tmp_path):
    with pytest.raises(ModelError, match="no checkpoint"):
        train(make(), 1, checkpoint=tmp_path / "run", resume=True)
    with pytest.raises(OptionError, match="checkpoint="):
        train(make(), 1, resume=True)


@pytest.mark.parametrize("name", ["weights.safetensors", "optimizer.safetensors", "state.json"])
def test_a_truncated_checkpoint_is_one_error(name, make, tmp_path):
    run = tmp_path / "run"
    train(make(), 1, checkpoint=run)
    whole = (run / name).read_bytes()
    (run / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError, match="damaged"):
        train(make(), 2, checkpoint=run, resume=True)


def test_a_checkpoint_of_a_newer_atlasvi_is_refused(make, tmp_path):
    run = tmp_path / "run"
    train(make(), 1, checkpoint=run)
    state = json.loads((run / "state.json").read_text())
    (run / "state.json").write_text(json.dumps({**state, "format": 99}))
    with pytest.raises(VersionError, match="format 99"):
        train(make(), 2, checkpoint=run, resume=True)


def test_a_checkpoint_replaces_no_folder_of_somebody_elses(make, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ModelError, match=r"thesis\.tex"):
        train(make(), 1, checkpoint=tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_a_new_run_leaves_no_checkpoint_of_the_one_before(make, tmp_path):
    run = tmp_path / "run"
    train(make(), 1, checkpoint=run)
    with pytest.raises(Killed):
        train(make(), checkpoint=run, checkpoint_every_seconds=1e9, on_epoch=kill_at(0))
    with pytest.raises(ModelError, match="no checkpoint"):
        train(make(), 2, checkpoint=run, resume=True)


def test_a_kill_between_the_two_renames_loses_no_checkpoint(make, tmp_path):
    run = tmp_path / "run"
    train(make(), 2, checkpoint=run)
    shutil.move(run, tmp_path / ".run.old")
    (tmp_path / ".run.new").mkdir()
    assert_same(train(make()), train(make(), checkpoint=run, resume=True))
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


class KilledAmid(Exception):
    """Stands for a kill amid an epoch."""


def test_a_run_that_was_killed_amid_an_epoch_goes_on_from_there(make, tmp_path, monkeypatch):
    whole = train(make())
    model = make()
    steps = []

    def die_at_step_8(gradient):
        steps.append(1)
        if len(steps) == 8:
            raise KilledAmid
        return gradient

    model.module.decoder.scale.bias.register_hook(die_at_step_8)
    # So short that there is a checkpoint after every step: 5 steps an epoch, so 7 is amid the second.
    checkpoint = {"checkpoint": tmp_path / "run", "checkpoint_every_seconds": 1e-9}
    with pytest.raises(KilledAmid):
        train(model, **checkpoint)
    state = json.loads((tmp_path / "run" / "state.json").read_text())["progress"]
    assert (state["epoch"], state["minibatch"], state["step"]) == (1, 2, 7)
    resumed = train(make(), **checkpoint, resume=True)
    assert_same(whole, resumed)
    assert_same_history(whole, resumed)


def test_the_weights_kept_are_those_of_the_best_look(make):
    model = make()
    values = {}

    def keep(record):
        values[record.epoch] = record.elbo_validation

    # A rate at which it soon gets worse again.
    train(model, 80, plan_kwargs={"lr": 0.3, "patience": 1}, on_epoch=keep)
    assert len(values) < 80
    again = np.mean([-model.get_elbo(indices=model.validation_indices, seed=s) for s in range(5)])
    best = model.validation_history["elbo_validation"].min()
    assert again == pytest.approx(best, rel=0.02)


def test_the_average_is_of_the_weights_of_the_steps(make):
    from atlasvi.train.average import AT_FIRST, EVERY, Averaged

    module = make().module
    bias = module.decoder.scale.bias
    average = Averaged(module, decay=0.9)
    expected = bias.detach().clone()
    for step in range(1, AT_FIRST + 3 * EVERY + 1):
        with torch.no_grad():
            bias.fill_(float(step))
        average.update(step)
        steps = 1 if step <= AT_FIRST else EVERY
        if step % steps == 0:
            decay = min(0.9, (1 + step) / (10 + step)) ** steps
            expected = decay * expected + (1 - decay) * step
    torch.testing.assert_close(average.values["decoder.scale.bias"], expected)
    with average.applied():
        torch.testing.assert_close(bias.detach(), expected)
    assert bool((bias == AT_FIRST + 3 * EVERY).all())


def test_the_decoder_starts_at_the_genes_shares(make, adata):
    from atlasvi.models.data import gene_shares

    model = make()
    shares = gene_shares(model._minibatches(None, None, None), model.fields.n_vars)
    totals = np.asarray(adata.X.sum(0)).ravel() + 0.5
    np.testing.assert_allclose(shares, totals / totals.sum(), rtol=1e-5)
    model.module.start_at(shares)
    np.testing.assert_allclose(model.module.decoder.scale.bias.detach().exp(), shares, rtol=1e-5)


def test_bfloat16_products_change_weights_a_little_and_the_elbo_hardly(make):
    whole, narrow = train(make()), train(make(), precision="bf16")
    assert not torch.equal(*(weights(m)["decoder.scale.weight"] for m in (whole, narrow)))
    values = [m.validation_history["elbo_validation"].iloc[-1] for m in (whole, narrow)]
    assert values[0] == pytest.approx(values[1], rel=5e-3)
    with pytest.raises(OptionError, match="precision"):
        train(make(), precision="int4")


# --- what is not finite -------------------------------------------------------------------------


def poison_loss_at(model, monkeypatch, step, value=float("nan")):
    real = model.module.loss
    seen = {}

    def loss(minibatch, noise, weights=None):
        terms = real(minibatch, noise, weights)
        if model.module.training and noise.step == step:
            seen["rows"], seen["weights"] = minibatch.rows.tolist(), parameters(model)
            return type(terms)(terms.total * value, terms.reconstruction, terms.kl_z, terms.kl_library)
        return terms

    monkeypatch.setattr(model.module, "loss", loss)
    return seen


def parameters(model):
    return {name: value.detach().clone() for name, value in model.module.named_parameters()}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_and_names_step_rows_and_checkpoint(
    value, make, monkeypatch, tmp_path
):
    model, run = make(), tmp_path / "run"
    # 270 cells in minibatches of 64 are 5 steps an epoch; step 7 is in the second.
    seen = poison_loss_at(model, monkeypatch, 7, value)
    with pytest.raises(TrainingError) as raised:
        # Without early stopping no best weights are kept, to be put back.
        train(model, checkpoint=run, checkpoint_every_seconds=0.0, early_stopping=False)
    message = str(raised.value)
    assert "step 7" in message
    assert "epoch 1" in message
    assert ", ".join(map(str, seen["rows"][:8])) in message
    assert "64 in all" in message
    assert f"the last good checkpoint is {str(run)!r}" in message
    assert "\n" not in message
    assert_same(seen["weights"], parameters(model))
    assert json.loads((run / "state.json").read_text())["progress"]["step"] == 5


def test_the_run_goes_on_from_that_checkpoint(make, monkeypatch, tmp_path):
    model, run = make(), tmp_path / "run"
    poison_loss_at(model, monkeypatch, 7)
    with pytest.raises(TrainingError):
        train(model, checkpoint=run, checkpoint_every_seconds=0.0)
    assert_same(train(make()), train(make(), checkpoint=run, resume=True))


@pytest.mark.parametrize(("how", "words"), [(False, "no checkpoint was asked for"), (True, "written yet")])
def test_it_says_when_there_is_no_checkpoint(how, words, make, monkeypatch, tmp_path):
    model = make()
    poison_loss_at(model, monkeypatch, 0)
    with pytest.raises(TrainingError, match=words):
        train(model, **({"checkpoint": tmp_path / "run"} if how else {}))


def test_a_gradient_that_is_not_finite_makes_no_checkpoint_of_its_weights(make, tmp_path):
    model, run = make(), tmp_path / "run"
    steps = []

    def poison(gradient):
        steps.append(1)
        # The last step of the second epoch, whose loss is finite.
        return gradient * float("nan") if len(steps) == 10 else gradient

    model.module.decoder.scale.bias.register_hook(poison)
    with pytest.raises(TrainingError, match=r"step 9 \(epoch 1\)"):
        train(model, checkpoint=run, checkpoint_every_seconds=0.0)
    assert json.loads((run / "state.json").read_text())["progress"]["step"] == 5


@pytest.mark.parametrize("step", [3, 12])
def test_a_training_that_goes_wrong_leaves_the_weights_of_the_best_look(step, make, monkeypatch):
    model, looks = make(), []
    poison_loss_at(model, monkeypatch, step)

    def look(check):
        state = floating_state(model.module)
        looks.append((check.elbo_validation, {name: value.clone() for name, value in state.items()}))

    with pytest.raises(TrainingError, match="the model has the weights of the best look"):
        train(model, on_check=look, plan_kwargs={"averaging": None, "n_steps_per_check": 2})
    assert model.is_trained and len(model.records) == step // 5
    assert len(looks) == (1 if step == 3 else 7)
    kept = floating_state(model.module)
    for name, value in min(looks, key=lambda look: look[0])[1].items():
        assert torch.equal(kept[name], value), name
    assert model.get_elbo() < 0


def test_a_model_with_weights_that_are_no_numbers_neither_answers_nor_is_saved(make, tmp_path):
    model = train(make(), 2)

    def poison(record):
        next(model.module.parameters()).data.fill_(float("nan"))

    with pytest.raises(TrainingError):
        train(model, 2, schedule="scvi-tools", on_epoch=poison)
    with pytest.raises(NotTrainedError):
        model.get_elbo()
    with pytest.raises(ModelError, match="NaN or infinite"):
        model.save(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_what_was_learnt_stays_when_a_further_training_is_stopped(make):
    model = train(make(), 8)
    before, elbo = parameters(model), model.get_elbo()

    def stop(_):
        raise KeyboardInterrupt

    still = {"plan_kwargs": {"lr": 1e-12}}
    with pytest.raises(KeyboardInterrupt):
        model.train(2, batch_size=8, on_check=stop, enable_progress_bar=False, **still)
    assert model.is_trained and not model.records
    assert model.get_elbo() == pytest.approx(elbo, rel=0.02)
    train(model, 1, **still)
    for name, value in parameters(model).items():  # the decoder does not start again at the genes' shares
        torch.testing.assert_close(value, before[name], rtol=0, atol=1e-6)


def test_a_weight_that_is_nan_is_seen_at_the_first_step(make):
    model = make()
    with torch.no_grad():
        model.module.encoder.loc.weight[0, 0] = float("nan")
    with pytest.raises(TrainingError, match="step 0"):
        train(model, 1)
    assert not model.is_trained


# --- schedule -----------------------------------------------------------------------------------


def test_early_stopping_stops_and_the_history_ends_there(make):
    model = train(make(), 30, early_stopping=True, early_stopping_patience=2, early_stopping_min_delta=1e9)
    # The first epoch is a gain over nothing; two without follow.
    assert len(model.history["elbo_validation"]) == 3


@pytest.mark.parametrize(("patience", "epochs"), [(0, 2), (1, 2), (4, 5)])
def test_patience_is_in_epochs_however_often_there_are_looks(patience, epochs, make):
    model = make()
    model.train(
        30, batch_size=8, early_stopping=True, early_stopping_patience=patience,
        early_stopping_min_delta=1e9, enable_progress_bar=False,
    )  # fmt: skip
    assert len(model.records) == epochs
    assert len(model.checks) > len(model.records)
    with pytest.raises(OptionError, match="early_stopping_patience must be 0 or more"):
        train(model, 1, early_stopping_patience=-1)


def test_early_stopping_by_a_training_term_needs_no_cells_kept(make):
    options = {"early_stopping": True, "early_stopping_patience": 1, "early_stopping_min_delta": 1e9}
    with pytest.raises(OptionError, match="train_size below 1"):
        train(make(), 9, train_size=1.0, **options)
    model = train(make(), 9, train_size=1.0, early_stopping_monitor="elbo_train", **options)
    assert len(model.history["elbo_train"]) == 2
    assert "elbo_validation" not in model.history


def test_the_rate_falls_on_a_plateau(make):
    plan = {"reduce_lr_on_plateau": True, "lr_patience": 0, "lr_threshold": 1e9, "lr": 0.01, "lr_factor": 0.5}
    rates = train(make(), schedule="scvi-tools", plan_kwargs=plan).history["lr"]["lr"]
    assert rates.tolist() == pytest.approx([0.01, 0.01, 0.005, 0.0025])
    with pytest.raises(OptionError, match="reduce_lr_on_plateau"):
        train(make(), plan_kwargs=plan, train_size=1.0)


def test_the_kl_weight_of_each_epoch_is_in_the_history_and_in_the_loss(make):
    model = train(make(), plan_kwargs={"n_epochs_kl_warmup": 2})
    history = {name: frame[name].to_numpy() for name, frame in model.history.items()}
    assert history["kl_weight"].tolist() == [0.0, 0.5, 1.0, 1.0]
    expected = history["reconstruction_loss_train"] + history["kl_weight"] * history["kl_local_train"]
    np.testing.assert_allclose(history["train_loss_epoch"], expected, rtol=1e-5)
    np.testing.assert_allclose(
        history["elbo_train"], history["reconstruction_loss_train"] + history["kl_local_train"], rtol=1e-6
    )


def test_validation_can_be_rarer_than_epochs_and_is_there_at_the_end(make):
    frame = train(make(), 5, check_val_every_n_epoch=2).history["elbo_validation"]["elbo_validation"]
    assert frame.isna().tolist() == [True, False, True, False, False]
    with pytest.raises(OptionError, match="check_val_every_n_epoch"):
        train(make(), 1, check_val_every_n_epoch=0)


def test_validation_does_not_change_the_weights(make):
    assert_same(train(make(), 3, check_val_every_n_epoch=1), train(make(), 3, check_val_every_n_epoch=3))


def test_validation_is_the_elbo_of_the_cells_kept_apart(make):
    model = train(make(), 2)
    assert len(model.train_indices) == 270
    assert len(model.validation_indices) == 30
    both = np.concatenate([model.train_indices, model.validation_indices])
    assert sorted(both.tolist()) == list(range(300))
    # The draws differ, the cells are the same: they agree within the noise of one draw a cell.
    record = model.records[-1].elbo_validation
    again = np.mean([-model.get_elbo(indices=model.validation_indices, seed=s) for s in range(10)])
    assert record == pytest.approx(again, rel=0.02)


@pytest.mark.parametrize(
    "options",
    [
        {"train_size": 0.0}, {"train_size": 1.5}, {"train_size": 0.9, "validation_size": 0.2},
        {"train_size": 0.005}, {"max_epochs": 0}, {"batch_size": 2},
    ],
)  # fmt: skip
def test_shares_and_sizes_that_cannot_be_are_refused(options, make):
    with pytest.raises(OptionError):
        make().train(**{"max_epochs": 1, "enable_progress_bar": False, **options})


def test_a_training_that_is_refused_leaves_the_model_as_it_was(make):
    model = train(make(), 1)
    before = model.validation_indices.tolist()
    with pytest.raises(OptionError, match="reduce_lr_on_plateau"):
        model.train(1, train_size=1.0, plan_kwargs={"reduce_lr_on_plateau": True}, enable_progress_bar=False)
    assert model.validation_indices.tolist() == before
    assert model.was_trained_on()


def test_cells_can_be_split_in_order_and_left_out(make):
    model = train(make(), 1, train_size=0.5, validation_size=0.1, shuffle_set_split=False)
    assert model.train_indices.tolist() == list(range(150))
    assert model.validation_indices.tolist() == list(range(150, 180))


def test_no_share_given_is_nine_tenths(make):
    model = train(make(), 1, train_size=None)
    assert (len(model.train_indices), len(model.validation_indices)) == (270, 30)


@pytest.mark.parametrize("n_train", [3, 64, 65, 66, 67])
def test_a_tail_of_a_cell_or_two_upsets_no_batch_norm(n_train, adata):
    SCVI.setup_anndata(adata, gene_mask=None)
    model = SCVI(adata, n_hidden=16, n_latent=3)
    model.train(2, batch_size=64, train_size=n_train / 300, enable_progress_bar=False)
    assert len(model.train_indices) == n_train
    assert all(torch.isfinite(value).all() for value in model.module.state_dict().values())
