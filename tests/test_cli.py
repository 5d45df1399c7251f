"""The command, as a person runs it: a process of its own, its words, its exit codes, its files."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import asdict
from pathlib import Path
from urllib.request import urlopen

import anndata
import numpy as np
import pytest
import scipy.sparse as sp
import torch
from safetensors.torch import load_file

from atlasvi.cli import main
from atlasvi.models.scvi import SCVI
from atlasvi.scorecard import QUICK, evaluate
from atlasvi.train.fit import Run
from tests.conftest import make_adata

COMMANDS = ["ingest", "info", "train", "latent", "decode", "impute", "publish", "serve", "de", "convert"]
COMMANDS += ["demo", "predict", "evaluate"]
# One thread: small tensors gain nothing from more, and processes of tests share the machine.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1", "TERM": "dumb", "COLUMNS": "120"}
SMALL = ["--n-hidden", "16", "--n-latent", "3", "--batch-size", "64", "--gene-mask", "none"]


def command(*arguments):
    return [sys.executable, "-m", "atlasvi.cli", *map(str, arguments)]


def atlasvi(*arguments, code=0, cwd=None):
    result = subprocess.run(
        command(*arguments),
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        cwd=cwd,
        check=False,
        timeout=120,
    )
    assert result.returncode == code, result.stderr
    return result


def one_line(said):
    lines = said.strip().splitlines()
    assert len(lines) == 1, said
    assert lines[0].startswith("error: ")
    return lines[0]


@pytest.fixture
def error_of(command_here):
    """The one line that an error is."""

    def run(*arguments, cwd=None):
        done = command_here(*arguments, cwd=cwd)
        assert done.returncode == 1
        return one_line(done.stderr)

    return run


@pytest.fixture
def run_here(command_here):
    """What a command prints that goes well."""

    def run(*arguments, cwd):
        done = command_here(*arguments, cwd=cwd)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def snapshot(folder):
    return {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """What the commands leave when they are run one after another; not to be written to."""
    folder = tmp_path_factory.mktemp("cli")
    make_adata().write_h5ad(folder / "cells.h5ad")
    said = {
        "ingest": atlasvi("ingest", "cells.h5ad", "-o", "atlas.zarr", cwd=folder),
        "train": atlasvi(
            "train",
            "atlas.zarr",
            "-o",
            "model",
            "--batch-key",
            "batch",
            "--max-epochs",
            3,
            *SMALL,
            cwd=folder,
        ),
        "latent": atlasvi("latent", "model", "atlas.zarr", cwd=folder),
        "decode": atlasvi(
            "decode", "model", "atlas.zarr", "-o", "rho.zarr", "-g", "gene-5", "-g", "gene-2", cwd=folder
        ),
    }
    return folder, said


def test_python_runs_the_package_as_the_command():
    said = subprocess.run(
        [sys.executable, "-m", "atlasvi", "info", "nothing"],
        capture_output=True, text=True, env=ENVIRONMENT, check=False, timeout=120,
    )  # fmt: skip
    assert said.returncode == 1
    assert "'nothing'" in one_line(said.stderr)


# --- what goes right ----------------------------------------------------------------------------


def test_the_way_from_counts_to_rho(made):
    folder, said = made
    assert "300 cells x 60 genes" in said["ingest"].stdout
    kept = re.search(
        r"3 epochs, -ELBO [\d.]+, ([\d.]+) on held-out cells after step (\d+) of 15, the best and kept",
        said["train"].stdout,
    )
    assert "cells/s" not in said["train"].stdout  # progress goes to the other stream
    assert re.search(r"train, about \d+ MB, counts kept in memory: 810 cells", said["train"].stderr)
    cells = anndata.read_h5ad(folder / "cells.h5ad")
    store = anndata.read_zarr(folder / "atlas.zarr")
    assert (store.X != cells.X).nnz == 0
    model = SCVI.load(folder / "model", folder / "atlas.zarr")
    best = model.validation_history.sort_values("elbo_validation").iloc[0]
    assert (f"{best.elbo_validation:.1f}", str(best.name)) == kept.groups()
    np.testing.assert_allclose(store.obsm["X_scVI"], model.get_latent_representation(), rtol=1e-4, atol=1e-5)
    rho = anndata.read_zarr(folder / "rho.zarr")
    assert rho.var_names.tolist() == ["gene-5", "gene-2"]
    assert rho.obs_names.tolist() == cells.obs_names.tolist()
    expected = model.get_normalized_expression(gene_list=["gene-5", "gene-2"])
    np.testing.assert_allclose(rho.X, expected.to_numpy(), rtol=1e-4)


def test_the_model_folder_has_a_log_of_each_epoch(made):
    folder, _ = made
    lines = (folder / "model" / "history.csv").read_text().splitlines()
    assert "elbo_validation" in lines[0].split(",")
    assert [line.split(",")[0] for line in lines[1:]] == ["0", "1", "2"]
    assert sorted(p.name for p in (folder / "model").iterdir()) == [
        "checkpoint", "history.csv", "model.json", "weights.safetensors",
    ]  # fmt: skip
    description = json.loads((folder / "model" / "model.json").read_text())
    assert description["fields"]["batch_categories"] == ["b1", "b2"]


def test_the_command_trains_what_python_trains(made):
    folder, _ = made
    import atlasvi as package

    atlas = package.open(folder / "atlas.zarr")
    SCVI.setup_anndata(atlas, batch_key="batch", gene_mask=None)
    model = SCVI(atlas, n_hidden=16, n_latent=3)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model.train(3, batch_size=64, enable_progress_bar=False)
    torch.set_num_threads(threads)
    weights = load_file(folder / "model" / "weights.safetensors")
    for name, value in model.module.state_dict().items():
        torch.testing.assert_close(weights[name], value, rtol=1e-4, atol=1e-5)


def test_info_tells_of_atlas_and_model(made, run_here):
    folder, _ = made
    atlas = run_here("info", "atlas.zarr", cwd=folder)
    for word in ("300", "60", "batch", "2 levels: b1, b2", "cell_type", "highly_variable"):
        assert word in atlas
    model = run_here("info", "model", cwd=folder)
    for word in ("SCVI", "zinb", "b1, b2", "epochs", "nats", "the best on held-out cells: of step"):
        assert word in model


def test_info_sums_up_the_counts_when_asked(made, run_here):
    folder, _ = made
    counts = anndata.read_h5ad(folder / "cells.h5ad").X.toarray()
    said = run_here("info", "atlas.zarr", "--stats", "--batch-key", "batch", cwd=folder)
    lines = {line.split("  ")[0]: line for line in said.splitlines()}
    assert f"median {np.median(counts.sum(1)):,.0f}, 5 %" in lines["counts a cell"]
    assert f"median {np.median((counts > 0).sum(1)):,.0f}, 5 %" in lines["genes a cell"]
    assert f"{(counts > 0).sum():,}, {(counts > 0).mean():.2%}" in lines["non-zeros"]
    share = counts.sum(0) / counts.sum()
    assert f"gene-{share.argmax()} {share.max():.1%}, " in lines["most of the counts"]
    assert "log counts: mean" in lines["batch b1"] and "log counts: mean" in lines["batch b2"]
    assert "mitochondrial" not in said


def test_latents_go_into_an_h5ad_that_is_named(made, run_here, tmp_path):
    folder, _ = made
    path = tmp_path / "cells.h5ad"
    path.write_bytes((folder / "cells.h5ad").read_bytes())
    run_here("latent", folder / "model", folder / "atlas.zarr", "-o", path, "--key", "X_mine", cwd=tmp_path)
    store = anndata.read_zarr(folder / "atlas.zarr")
    np.testing.assert_array_equal(anndata.read_h5ad(path).obsm["X_mine"], store.obsm["X_scVI"])


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_every_command_has_an_example(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["atlasvi", name, "--help"])
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    with pytest.raises(SystemExit) as end:
        main()
    assert not end.value.code
    text = capsys.readouterr().out
    assert "Example" in text
    assert f"atlasvi {name}" in text
    if name not in ("info", "serve"):
        assert "--out" in text
        assert "-o" in text


def test_help_names_every_command_and_loads_nothing_heavy():
    script = (
        "import sys\nsys.argv = ['atlasvi', '--help']\nfrom atlasvi.cli import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code\n"
        "print('LOADED', *sorted({m.split('.')[0] for m in sys.modules}))"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=ENVIRONMENT, check=True
    )
    text, _, loaded = result.stdout.rpartition("LOADED")
    assert all(name in text for name in COMMANDS)
    assert not set(loaded.split()) & {"torch", "numba", "anndata", "numpy", "pandas", "zarr", "dask", "scipy"}


# --- what goes wrong ----------------------------------------------------------------------------


def write(folder, change):
    cells = anndata.AnnData(sp.csr_matrix(np.ones((20, 10), np.float32)))
    cells.obs["batch"] = ["a", "b"] * 10
    change(cells)
    cells.write_h5ad(folder / "cells.h5ad")


def test_an_atlas_that_is_not_there(tmp_path):
    line = one_line(atlasvi("train", "nothing.zarr", "-o", "model", code=1, cwd=tmp_path).stderr)
    assert "'nothing.zarr'" in line
    assert "atlasvi ingest" in line
    assert not list(tmp_path.iterdir())


def test_a_layer_that_is_not_there_is_answered_with_those_that_are(tmp_path, error_of):
    write(tmp_path, lambda cells: cells.layers.update(counts=cells.X))
    line = error_of("ingest", "cells.h5ad", "-o", "atlas.zarr", "--layer", "count", cwd=tmp_path)
    assert "'count'" in line
    assert "'counts'" in line
    assert [p.name for p in tmp_path.iterdir()] == ["cells.h5ad"]


def test_negative_counts_are_named_by_cell_and_gene(tmp_path, error_of):
    def spoil(cells):
        cells.X[3, 7] = -1

    write(tmp_path, spoil)
    line = error_of("ingest", "cells.h5ad", "-o", "atlas.zarr", cwd=tmp_path)
    for word in ("-1", "'3'", "'7'"):
        assert word in line
    assert [p.name for p in tmp_path.iterdir()] == ["cells.h5ad"]


def test_a_batch_column_that_is_not_there_is_answered_with_its_neighbour(made, tmp_path, error_of):
    folder, _ = made
    line = error_of("train", folder / "atlas.zarr", "-o", tmp_path / "m", "--batch-key", "bacth", *SMALL)
    assert "'bacth'" in line
    assert "did you mean 'batch'" in line
    assert not list(tmp_path.iterdir())


def test_imputed_counts_and_technical_zeros_are_those_of_the_model(made, run_here, tmp_path):
    folder, _ = made
    out = tmp_path / "imputed.zarr"
    genes = ["gene-5", "gene-2"]
    run_here(
        "impute",
        "model",
        "atlas.zarr",
        "-o",
        out,
        "-g",
        genes[0],
        "-g",
        genes[1],
        "--technical-zeros",
        cwd=folder,
    )
    back = anndata.read_zarr(out)
    model = SCVI.load(folder / "model", folder / "atlas.zarr")
    np.testing.assert_allclose(back.X, model.denoised_counts(genes=genes).compute(), rtol=2e-5)
    zeros = model.technical_zeros(genes=genes).compute()
    np.testing.assert_allclose(back.layers["technical_zero"], zeros, rtol=2e-5)
    assert back.var_names.tolist() == genes


def test_a_scorecard_is_that_of_python(made, run_here, tmp_path):
    folder, _ = made
    how = ["--label-key", "cell_type", "--quick", "--cells", 100]
    said = run_here("evaluate", "model", "atlas.zarr", "-o", tmp_path / "card", *how, cwd=folder)
    model = SCVI.load(folder / "model", folder / "atlas.zarr")
    card = evaluate(model, label_key="cell_type", picture=False, **{**asdict(QUICK), "n_cells": 100})
    assert (tmp_path / "card" / "scorecard.json").read_text() == card.to_json()
    assert (tmp_path / "card" / "scorecard.html").read_text() == card.to_html()
    assert f"{card.likelihood.elbo:,.1f}" in said and "kept apart from training" in " ".join(said.split())
    run_here("evaluate", "model", "atlas.zarr", "-o", tmp_path / "card.json", *how, cwd=folder)
    assert (tmp_path / "card.json").read_text() == card.to_json()


def test_what_is_published_is_served(made, run_here, tmp_path):
    folder, _ = made
    run_here("publish", "model", "atlas.zarr", "-o", tmp_path / "my.atlasvi", cwd=folder)
    process = subprocess.Popen(
        command("serve", tmp_path / "my.atlasvi", "--port", "0"), env=ENVIRONMENT | {"PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        url = re.search(r"http://127\.0\.0\.1:\d+", process.stdout.readline())[0]
        with urlopen(f"{url}/layers/rho/zarr.json") as answer:
            described = json.loads(answer.read())
    finally:
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=60)
    assert described["data_type"] == "float32"
    assert process.returncode == 130, said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["ingest", "cells.h5ad", "-o", "atlas.zarr"], "atlas.zarr"),
        (["train", "atlas.zarr", "-o", "model"], "--resume"),
        (["train", "atlas.zarr", "-o", "atlas.zarr"], "not a model"),
        (["train", "atlas.zarr", "-o", "cells.h5ad"], "is a file"),
        (["decode", "model", "atlas.zarr", "-o", "rho.zarr", "-g", "gene-1"], "--overwrite"),
        (["decode", "model", "atlas.zarr", "-o", "model", "-g", "gene-1", "--overwrite"], "model"),
        (["decode", "model", "atlas.zarr", "-o", "atlas.zarr", "-g", "gene-1", "--overwrite"], "read from"),
    ],
)
def test_what_is_there_is_not_written_over(arguments, words, made, error_of):
    folder, _ = made
    before = snapshot(folder)
    assert words in error_of(*arguments, cwd=folder)
    assert snapshot(folder) == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["decode", "model", "atlas.zarr", "-o", "new.zarr", "-g", "gene5"], "'gene5'; near it: gene-5"),
        (["decode", "model", "atlas.zarr", "-o", "new.zarr", "--transform-batch", "b3"], "b1, b2"),
        (["decode", "model", "atlas.zarr", "-o", "new.zarr", "--library-size", "much"], "'much'"),
        (["decode", "atlas.zarr", "atlas.zarr", "-o", "new.zarr"], "not a model folder"),
        (["impute", "model", "atlas.zarr", "-o", "new.zarr", "-g", "gene5"], "'gene5'; near it: gene-5"),
        (["impute", "model", "atlas.zarr", "-o", "atlas.zarr"], "read from"),
        (["publish", "model", "atlas.zarr", "-o", "new.atlasvi", "--obs", "nothing"], "'nothing'"),
        (["publish", "model", "atlas.zarr", "-o", "atlas.zarr", "--overwrite"], "no published atlas"),
        (["serve", "atlas.zarr"], "no published atlas"),
        (["evaluate", "model", "atlas.zarr", "-o", "new", "--label-key", "cel_type"], "mean 'cell_type'"),
        (["evaluate", "atlas.zarr", "atlas.zarr", "-o", "new"], "not a model folder"),
        (["evaluate", "model", "atlas.zarr", "-o", "new.html"], "end it in .json"),
        (["evaluate", "model", "atlas.zarr", "-o", "model", "--overwrite"], "no scorecard's"),
        (["evaluate", "model", "atlas.zarr", "-o", "new.json", "--cells", "0", "--quick"], "n_cells"),
        (["latent", "model", "model"], "not an atlas"),
        (["latent", "model", "atlas.zarr", "-o", "nothing.h5ad"], "nothing.h5ad"),
        (["info", "nothing"], "'nothing'"),
        (["info", "nothing", "--batch-key", "donor"], "--stats"),
        (["train", "atlas.zarr", "-o", "new", "--likelihood", "normal", "--gene-mask", "none"], "'normal'"),
        (["train", "atlas.zarr", "-o", "new", "--gene-mask", "mine"], "'mine'"),
        (["train", "atlas.zarr", "-o", "new", "--resume", "--gene-mask", "none"], "no checkpoint"),
    ],
)
def test_errors_are_one_line_and_leave_nothing(arguments, words, made, error_of):
    folder, _ = made
    before = snapshot(folder)
    assert words in error_of(*arguments, cwd=folder)
    assert snapshot(folder) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written_to_is_one_line(made, tmp_path, error_of):
    folder, _ = made
    tmp_path.chmod(0o500)
    assert "Permission denied" in error_of(
        "train", folder / "atlas.zarr", "-o", tmp_path / "m", "--max-epochs", 1, *SMALL
    )


def test_a_wrong_call_exits_with_2(tmp_path, monkeypatch, capsys):
    assert "Traceback" not in atlasvi("fly", code=2, cwd=tmp_path).stderr
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    for arguments in (["train"], ["train", "a", "-o", "b", "--max-epochs", "many"], ["info", "a", "--wings"]):
        monkeypatch.setattr(sys, "argv", ["atlasvi", *arguments])
        with pytest.raises(SystemExit) as end:
            main()
        assert end.value.code == 2


# --- stopped ------------------------------------------------------------------------------------


def start_training(folder, out, *more):
    """A run that would take minutes, once it has written its first epoch."""
    process = subprocess.Popen(
        command("train", folder / "atlas.zarr", "-o", out, "--batch-key", "batch", "--checkpoint-every", 0,
                "--max-epochs", *more, *SMALL),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not (out / "checkpoint" / "state.json").exists():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return process


def test_a_run_that_was_killed_goes_on_to_the_same_weights(made, tmp_path, error_of):
    folder, _ = made
    epochs = 40
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    how = ["--batch-key", "batch", "--max-epochs", epochs, *SMALL]
    atlasvi("train", folder / "atlas.zarr", "-o", whole, *how)
    process = start_training(folder, killed, epochs)
    process.send_signal(signal.SIGKILL)
    assert process.wait(30) == -signal.SIGKILL
    process.communicate()
    assert not (killed / "model.json").exists(), "it was not killed in time"
    assert "--resume" in error_of("latent", killed, folder / "atlas.zarr")
    assert "--resume" in error_of("train", folder / "atlas.zarr", "-o", killed, *how)
    atlasvi("train", folder / "atlas.zarr", "-o", killed, *how, "--resume")
    assert (whole / "weights.safetensors").read_bytes() == (killed / "weights.safetensors").read_bytes()
    lines = (killed / "history.csv").read_text().splitlines()[1:]
    assert [int(line.split(",")[0]) for line in lines] == list(range(epochs))
    assert "lr=0.01, now 0.5" in error_of(
        "train", folder / "atlas.zarr", "-o", killed, *how, "--resume", "--lr", 0.5
    )


def test_ctrl_c_leaves_130_and_whole_files(made, tmp_path):
    folder, _ = made
    atlas = snapshot(folder / "atlas.zarr")
    out = tmp_path / "model"
    process = start_training(folder, out, 100_000)
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Traceback" not in said
    assert said.strip().splitlines()[-1].startswith("stopped")
    assert sorted(p.name for p in out.iterdir()) == ["checkpoint", "history.csv"]
    state = json.loads((out / "checkpoint" / "state.json").read_text())
    load_file(out / "checkpoint" / "weights.safetensors")
    assert len(state["progress"]["records"]) <= len((out / "history.csv").read_text().splitlines()) - 1
    assert snapshot(folder / "atlas.zarr") == atlas


def test_a_run_that_was_stopped_in_its_first_epoch_goes_on_beside_the_model_that_it_is_to_replace(
    made, command_here, tmp_path, monkeypatch
):
    out = tmp_path / "m"
    how = ["train", made[0] / "atlas.zarr", "-o", out, "--batch-key", "batch", "--max-epochs", 2, *SMALL]
    assert command_here(*how).returncode == 0
    old, step = (out / "history.csv").read_bytes(), Run.step

    again = [*how, "--seed", 1, "--checkpoint-every", 1e-9]
    for how_far, option in ((3, "--overwrite"), (6, "--resume")):  # of 5 steps an epoch

        def stopped(run, minibatch, how_far=how_far):
            if run.progress.step == how_far:
                raise OSError
            return step(run, minibatch)

        monkeypatch.setattr(Run, "step", stopped)
        assert command_here(*again, option).returncode == 1
        assert json.loads((out / "checkpoint" / "state.json").read_text())["progress"]["step"] == how_far
        assert (out / "history.csv").read_bytes() == old
    monkeypatch.setattr(Run, "step", step)
    assert command_here(*again, "--resume").returncode == 0
    assert (out / "history.csv").read_bytes() != old
    assert len((out / "history.csv").read_text().splitlines()) == 3


def test_a_training_that_fails_leaves_the_model_that_it_was_to_replace(made, command_here, tmp_path):
    how = ["train", made[0] / "atlas.zarr", "-o", tmp_path / "m", "--batch-key", "batch", "--max-epochs", 2]
    assert command_here(*how, *SMALL).returncode == 0
    kept = {name: data for name, data in snapshot(tmp_path / "m").items() if name.parts[0] != "checkpoint"}
    failed = command_here(*how, *SMALL, "--overwrite", "--lr", 1e9)
    assert failed.returncode == 1 and "Lower lr" in one_line(failed.stderr.splitlines()[-1])
    now = snapshot(tmp_path / "m")
    assert {name: now[name] for name in kept} == kept
    assert command_here(*how, *SMALL, "--overwrite", "--seed", 1).returncode == 0
    assert sorted(p.name for p in (tmp_path / "m").iterdir()) == [
        "checkpoint", "history.csv", "model.json", "weights.safetensors",
    ]  # fmt: skip
    assert snapshot(tmp_path / "m")[Path("history.csv")] != kept[Path("history.csv")]


# --- labels -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def labelled(tmp_path_factory, made):
    """Models that have labels, by what they are called."""
    import atlasvi as package

    folder = tmp_path_factory.mktemp("labels")
    options = {"labels_key": "cell_type", "gene_mask": None}
    for kind, more in ((package.ACTINN, {}), (package.SCANVI, {"unlabeled_category": "NK"})):
        atlas = package.open(made[0] / "atlas.zarr")
        kind.setup_anndata(atlas, **options, **more)
        model = kind(atlas)
        model.train(2, enable_progress_bar=False)
        model.save(folder / kind.__name__.lower())
    return folder


@pytest.mark.parametrize("name", ["actinn", "scanvi"])
def test_labels_as_a_table(name, labelled, made, tmp_path, monkeypatch):
    import pandas as pd

    from atlasvi.infer import write
    from atlasvi.models import load

    monkeypatch.setattr(write, "NAMES", 128)  # several pieces
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    out = tmp_path / "labels.csv.gz"
    words = ["predict", labelled / name, made[0] / "atlas.zarr", "-o", out, "--threshold", "0.5"]
    monkeypatch.setattr(sys, "argv", ["atlasvi", *map(str, words)])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 0
    table = pd.read_csv(out, index_col="cell")
    model = load(labelled / name, made[0] / "atlas.zarr")
    expected = model.predict(soft=True)
    assert table.index.tolist() == expected.index.tolist()
    assert table.columns.tolist() == ["label", *(f"p({label})" for label in model.labels)]
    np.testing.assert_allclose(table.iloc[:, 1:], expected, rtol=1e-4)
    sure = expected.max(axis=1) >= 0.5
    assert (table["label"] == np.where(sure, model.predict(), "unknown")).all()
    assert 0 < sure.sum()
    if name == "scanvi":
        nearest = model.label_distances().min(axis=1)
        far = float(nearest.median())
        monkeypatch.setattr(sys, "argv", [*sys.argv, "--max-distance", str(far), "--overwrite"])
        with pytest.raises(SystemExit) as end:
            main()
        assert end.value.code == 0
        table = pd.read_csv(out, index_col="cell")
        np.testing.assert_allclose(table["distance"], nearest, rtol=1e-4)
        assert (table["label"] == np.where(sure & (nearest <= far), model.predict(), "unknown")).all()
        assert table.columns.tolist()[:2] == ["label", "distance"]


def test_a_model_without_latents_is_asked_for_none(labelled, made, error_of):
    folder, _ = made
    before = snapshot(folder)
    assert "ACTINN has no latent" in error_of("latent", labelled / "actinn", folder / "atlas.zarr")
    assert snapshot(folder) == before


@pytest.mark.parametrize(
    ("name", "loss", "unit"),
    [
        ("ACTINN", "cross-entropy", "nats a cell"),
        ("DCA", "-log-likelihood", "nats a cell"),
        ("PCA", "squared error", "a cell"),
    ],
)
def test_a_loss_is_called_what_it_is(name, loss, unit, made, tmp_path, run_here, capsys):
    import atlasvi as package

    atlas, kind = package.open(made[0] / "atlas.zarr"), getattr(package, name)
    kind.setup_anndata(atlas, labels_key="cell_type", gene_mask=None)
    model = kind(atlas, **({} if name == "ACTINN" else {"n_latent": 3}))
    model.train(2)
    assert "-ELBO" not in capsys.readouterr().err
    model.save(tmp_path / "model")
    said = run_here("info", "model", cwd=tmp_path)
    assert "-ELBO" not in said
    assert re.search(rf"{loss}, training +[\d,.]+ {unit}", said)


def test_labels_that_cannot_be_are_refused(labelled, made, error_of, tmp_path):
    folder, _ = made
    out = tmp_path / "labels.csv"
    assert "SCVI has no labels" in error_of("predict", folder / "model", folder / "atlas.zarr", "-o", out)
    assert "names no table" in error_of("predict", labelled / "actinn", folder / "atlas.zarr", "-o", tmp_path)
    wrong = (("actinn", "1", "--threshold"), ("scanvi", "-1", "above 0"), ("scanvi", "nan", "above 0"))
    for name, far, said in wrong:
        words = labelled / name, folder / "atlas.zarr", "-o", out, "--max-distance", far
        assert said in error_of("predict", *words)
    out.write_text("mine")
    assert "there is a" in error_of("predict", labelled / "actinn", folder / "atlas.zarr", "-o", out)
    assert out.read_text() == "mine"
