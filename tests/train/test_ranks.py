"""Several processes that train one model come to the weights of one, and one goes on where two were."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from atlasvi.nn import ranks
from atlasvi.store.ingest import ingest

SCRIPT = """
import os, signal, sys
import torch
import atlasvi
torch.set_num_threads(1)
store, out, epochs, resume, *killed_at = sys.argv[1:]
atlas = atlasvi.open(store)
atlasvi.SCVI.setup_anndata(atlas, batch_key="batch", gene_mask=None)
model = atlasvi.SCVI(atlas, n_hidden=16, n_latent=3)
steps = []

def die(gradient):
    steps.append(1)
    if len(steps) == int(killed_at[0]) and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return gradient

if killed_at:
    model.module.decoder.scale.bias.register_hook(die)
model.train(
    int(epochs), batch_size=32, train_size=0.8, enable_progress_bar=False, memory_budget=1 << 18,
    early_stopping=False, checkpoint=out + "-run", checkpoint_every_seconds=0.0, resume=resume == "resume",
)
model.save(out, overwrite=True)
print(f"DONE {model.records[-1].elbo_train} {model.records[-1].elbo_validation}\\n", end="")
"""


LABELLED = """
import sys
import torch
import atlasvi
torch.set_num_threads(1)
store, out = sys.argv[1:]
atlas = atlasvi.open(store)
atlasvi.SCANVI.setup_anndata(atlas, "label", "Unknown", batch_key="batch", gene_mask=None)
model = atlasvi.SCANVI(atlas, n_hidden=16, n_latent=3, balance_labels=True)
model.train(2, batch_size=32, train_size=0.8, enable_progress_bar=False, memory_budget=1 << 18)
model.save(out, overwrite=True)
print(f"DONE {model.records[-1].elbo_train} {model.records[-1].train_loss_epoch}\\n", end="")
"""


@pytest.fixture
def store(adata, tmp_path):
    ingest(adata, tmp_path / "atlas.zarr")
    return tmp_path / "atlas.zarr"


def run(script, n, *arguments):
    """The numbers that each of `n` processes printed last.

    A script prints its line in one piece: ``torchrun`` starts Python unbuffered, where each argument of
    `print` is a write of its own, and those of two processes mix.
    """
    command = [sys.executable, str(script), *map(str, arguments)]
    if n > 1:
        launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={n}", "--standalone"]
        command = [sys.executable, *launcher, *command[1:]]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=180)
    assert done.returncode == 0, done.stderr[-3000:]
    said = [[float(x) for x in line.split()[1:]] for line in done.stdout.splitlines() if "DONE" in line]
    assert len(said) == n, done.stdout
    return said


def alone(script, *arguments):
    """Two processes that nobody watches over: each must see for itself that the other has gone."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }  # fmt: skip
    return [
        subprocess.Popen(
            [sys.executable, str(script), *map(str, arguments)], stderr=subprocess.PIPE, text=True,
            stdout=subprocess.DEVNULL, env={**os.environ, **shared, "RANK": str(rank)},
        )
        for rank in range(2)
    ]  # fmt: skip


def test_two_processes_of_which_one_is_killed_and_one_or_two_go_on_come_to_the_weights_of_one(
    store, tmp_path
):
    """240 of the cells are 8 minibatches of 32 an epoch: the 20th step is amid the third."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    survivor, killed = alone(script, store, tmp_path / "two", 3, "new", 20)
    (one,) = run(script, 1, store, tmp_path / "one", 3, "new")
    said = survivor.communicate(timeout=180)[1]
    killed.communicate(timeout=180)
    assert (survivor.returncode, killed.returncode) == (1, -signal.SIGKILL), said[-3000:]
    assert "TrainingError: process 0 of 2 has lost another one" in said
    assert f"the last good checkpoint is {str(tmp_path / 'two-run')!r}" in said
    assert not (tmp_path / "two").exists()
    assert json.loads((tmp_path / "two-run" / "state.json").read_text())["progress"]["epoch"] == 2
    shutil.copytree(tmp_path / "two-run", tmp_path / "after-run")
    (after,) = run(script, 1, store, tmp_path / "after", 3, "resume")
    two = run(script, 2, store, tmp_path / "two", 3, "resume")
    assert two[0] == two[1]
    whole = load_file(tmp_path / "one" / "weights.safetensors")
    for name, found in (("after", after), ("two", two[0])):
        assert found == pytest.approx(one, rel=1e-4)
        weights = load_file(tmp_path / name / "weights.safetensors")
        for key in whole:
            torch.testing.assert_close(whole[key], weights[key], rtol=2e-2, atol=2e-3, msg=f"{name} {key}")


def test_two_processes_share_labelled_cells_that_are_too_few_for_two(adata, tmp_path):
    adata.obs["label"] = ["Unknown" if i % 10 else kind for i, kind in enumerate(adata.obs["cell_type"])]
    ingest(adata, tmp_path / "atlas.zarr")
    script = tmp_path / "script.py"
    script.write_text(LABELLED)
    (one,) = run(script, 1, tmp_path / "atlas.zarr", tmp_path / "one")
    two = run(script, 2, tmp_path / "atlas.zarr", tmp_path / "two")
    assert two[0] == two[1]
    assert two[0] == pytest.approx(one, rel=1e-4)
    whole, shared = (load_file(tmp_path / name / "weights.safetensors") for name in ("one", "two"))
    for key in whole:
        torch.testing.assert_close(whole[key], shared[key], rtol=2e-2, atol=2e-3, msg=key)


def test_of_one_process_nothing_is_summed():
    value = torch.tensor([2.0], requires_grad=True)
    assert ranks.summed(value) is value
    assert (ranks.rank(), ranks.world_size(), ranks.agreed(True)) == (0, 1, True)


def test_batch_norm_of_one_process_is_torchs():
    x = torch.randn(8, 5, generator=torch.Generator().manual_seed(0))
    ours, theirs = (
        ranks.BatchNorm(5, momentum=0.01, eps=1e-3),
        torch.nn.BatchNorm1d(5, momentum=0.01, eps=1e-3),
    )
    assert torch.equal(ours(x), theirs(x))
    assert torch.equal(ours.running_var, theirs.running_var)
