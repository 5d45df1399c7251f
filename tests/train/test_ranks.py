"""Several processes that train one model come to the weights of one, and one goes on where two were."""

import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from atlasvi.nn import ranks
from atlasvi.store.ingest import ingest

SCRIPT = """
import sys
import torch
import atlasvi
torch.set_num_threads(1)
store, out, epochs, resume = sys.argv[1:]
atlas = atlasvi.open(store)
atlasvi.SCVI.setup_anndata(atlas, batch_key="batch", gene_mask=None)
model = atlasvi.SCVI(atlas, n_hidden=16, n_latent=3)
model.train(
    int(epochs), batch_size=32, train_size=0.8, enable_progress_bar=False, memory_budget=1 << 18,
    early_stopping=False, checkpoint=out + "-run", checkpoint_every_seconds=0.0, resume=resume == "resume",
)
model.save(out, overwrite=True)
print("DONE", model.records[-1].elbo_train, model.records[-1].elbo_validation)
"""


@pytest.fixture
def store(adata, tmp_path):
    ingest(adata, tmp_path / "atlas.zarr")
    return tmp_path / "atlas.zarr"


def run(script, n, *arguments):
    command = [sys.executable, str(script), *map(str, arguments)]
    if n > 1:
        launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={n}", "--standalone"]
        command = [sys.executable, *launcher, *command[1:]]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=180)
    assert done.returncode == 0, done.stderr[-3000:]
    return [[float(x) for x in line.split()[1:]] for line in done.stdout.splitlines() if "DONE" in line]


def test_two_processes_come_to_the_weights_of_one_and_one_goes_on_after_two(store, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    (one,) = run(script, 1, store, tmp_path / "one", 3, "new")
    two = run(script, 2, store, tmp_path / "two", 2, "new")
    assert two[0] == two[1]
    (after,) = run(script, 1, store, tmp_path / "two", 3, "resume")
    assert after == pytest.approx(one, rel=1e-4)
    whole, resumed = (load_file(tmp_path / name / "weights.safetensors") for name in ("one", "two"))
    for name in whole:
        torch.testing.assert_close(whole[name], resumed[name], rtol=2e-2, atol=2e-3, msg=name)


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
