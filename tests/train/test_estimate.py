"""What training will take: near what it does take, and what is done about it."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from atlasvi.errors import OptionError
from atlasvi.memory import available_bytes
from atlasvi.models.dca import DCA
from atlasvi.models.scvi import SCVI
from atlasvi.stream import Room
from atlasvi.train import estimate as module
from atlasvi.train.estimate import StepShape, choose_batch_size, estimate, looks_at_once, room_for_counts

# Without cells x genes in one op, so that the minibatch is what counts.
SHAPE = StepShape(
    20_000, 1_000.0, weights=30 << 20, trained=30 << 20, units=500, heads=2, is_fused=False, rows=1,
    copies=3, rounded=0, stream=16 << 20, looked_at=4_096,
)  # fmt: skip

_MEASURE = """
import json, sys
import anndata, numpy as np, scipy.sparse as sp
import atlasvi
import atlasvi.models.base as base
from atlasvi.memory import Watch, give_back

n_vars, batch_size, schedule = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
rng = np.random.default_rng(0)
counts = sp.random(1500, n_vars, 0.05, format="csr", random_state=rng, dtype=np.float32)
counts.data[:] = rng.poisson(2, counts.nnz) + 1
adata = anndata.AnnData(counts)
atlasvi.SCVI.setup_anndata(adata, gene_mask=None)
model = atlasvi.SCVI(adata)
said = []
choose = base.batch_size_that_fits
base.batch_size_that_fits = lambda *a: said.append(choose(*a)) or said[0]
give_back()
with Watch(interval=0.002) as watch:
    model.train(3, batch_size=batch_size, schedule=schedule, enable_progress_bar=False, memory_budget="16MB")
print(json.dumps([watch.peak_bytes - watch.before_bytes, said[0][1].total]))
"""


def measured(arguments):
    command = [sys.executable, "-W", "ignore", "-c", _MEASURE, *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.skipif(sys.platform != "linux", reason="anonymous memory is read from /proc")
def test_the_estimate_is_what_is_taken_and_at_most_half_as_much_again():
    cases = [("2000", "1024", "scvi-tools"), ("20000", "128", "adaptive")]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(measured, cases))
    for case, (taken, estimated) in zip(cases, found, strict=True):
        assert 0.9 * taken < estimated < 1.5 * taken, (case, taken / 1e6, estimated / 1e6)
    assert found[1][0] > 1.5 * found[0][0], "the two sizes must differ, or nothing is shown"


def total(size, shape=SHAPE):
    return estimate(shape, size).total


def test_auto_is_the_default_where_it_fits_and_the_largest_power_of_two_that_does_where_not():
    def auto(there_is):
        return choose_batch_size("auto", SHAPE, there_is, on_device=False)

    assert auto(None) == auto(1 << 40) == auto(total(128)) == 128
    assert auto(total(128) - 1) == auto(total(64)) == 64
    assert auto(total(16)) == 16
    with pytest.raises(OptionError, match="nor would 16 fit: lower memory_budget, n_hidden"):
        auto(total(16) - 1)


@pytest.mark.parametrize("asked", [3, 100, 128, 1000, 4096])
def test_a_size_that_was_asked_for_is_never_changed_but_refused_with_one_that_fits(asked):
    assert choose_batch_size(asked, SHAPE, total(asked), on_device=False) == asked
    if asked < 17:
        return
    with pytest.raises(OptionError) as raised:
        choose_batch_size(asked, SHAPE, total(asked) - 1, on_device=False)
    message = str(raised.value)
    assert f"batch_size={asked}: training would take about {total(asked) / 1e6:,.0f} MB" in message
    assert "\n" not in message
    offered = int(message.split("batch_size=")[-1].split()[0])
    assert choose_batch_size(offered, SHAPE, total(asked) - 1, on_device=False) == offered < asked


def test_of_a_gpu_the_stream_does_not_count():
    free = estimate(SHAPE, 128).on_device
    assert choose_batch_size("auto", SHAPE, free, on_device=True) == 128
    assert choose_batch_size("auto", SHAPE, free, on_device=False) < 128


def test_counts_may_take_half_of_what_training_leaves_on_a_gpu(monkeypatch):
    takes = estimate(SHAPE, 128)
    gpu = torch.device("cuda", 0)  # which need not be there to be named
    monkeypatch.setattr(module, "free_bytes", lambda device: takes.on_device + 1_000)
    assert room_for_counts(gpu, takes) == Room(gpu, 500)
    monkeypatch.setattr(module, "free_bytes", lambda device: takes.on_device - 1)
    assert room_for_counts(gpu, takes) == Room(gpu, 0)
    assert room_for_counts(torch.device("cpu"), takes) is None


def test_it_rises_with_all_that_takes_memory():
    more = {
        "n_vars": 40_000, "nonzeros": 2e3, "weights": 1 << 30, "trained": 1 << 30, "units": 5_000, "heads": 3,
        "rows": 4, "copies": 4, "rounded": 1 << 20, "stream": 1 << 30,
    }  # fmt: skip
    for name, value in more.items():
        assert total(128, replace(SHAPE, **{name: value})) > total(128), name
    assert total(128, replace(SHAPE, is_fused=True)) < total(128)
    assert total(128, replace(SHAPE, looked_at=0)) < total(128)
    assert total(128, replace(SHAPE, processes=2, looked_at=0)) < total(128, replace(SHAPE, looked_at=0))


@pytest.fixture
def model(adata):
    DCA.setup_anndata(adata, gene_mask=None)
    return DCA(adata)


def limited_to(monkeypatch, n_bytes):
    monkeypatch.setattr(module, "available_bytes", lambda: n_bytes)


def shape_of(model, monkeypatch):
    """What `train` estimates from."""
    seen = []
    choose = module.choose_batch_size
    monkeypatch.setattr(module, "choose_batch_size", lambda *a, **k: seen.append(a[1]) or choose(*a, **k))
    model.train(1, enable_progress_bar=False)
    return seen[0]


def test_train_takes_what_fits_and_refuses_before_the_first_step(model, adata, monkeypatch, tmp_path, caplog):
    shape = shape_of(model, monkeypatch)
    assert (shape.n_vars, shape.heads, shape.looked_at) == (60, 3, 30)
    limited_to(monkeypatch, total(32, shape))
    caplog.set_level("INFO", "atlasvi")
    fresh = DCA(adata)
    before = {name: value.clone() for name, value in fresh.module.state_dict().items()}
    with pytest.raises(OptionError, match=r"batch_size=128: .* batch_size=32 would fit"):
        fresh.train(1, enable_progress_bar=False, checkpoint=tmp_path / "run")
    assert all(torch.equal(value, before[name]) for name, value in fresh.module.state_dict().items())
    assert not (tmp_path / "run").exists()
    fresh.train(1, batch_size="auto", enable_progress_bar=False, checkpoint=tmp_path / "run")
    assert fresh._training["batch_size"] == 32
    assert "training with minibatches of 32 cells takes about" in caplog.text
    # A resumed run keeps its minibatches, whatever is free by then.
    limited_to(monkeypatch, 1 << 40)
    again = DCA(adata)
    again.train(2, batch_size="auto", enable_progress_bar=False, checkpoint=tmp_path / "run", resume=True)
    assert again._training["batch_size"] == 32
    with pytest.raises(OptionError, match="or 'auto'"):
        fresh.train(1, batch_size="large")


def test_auto_gives_the_weights_of_that_size(adata, monkeypatch):
    SCVI.setup_anndata(adata, gene_mask=None)
    models = [SCVI(adata, n_hidden=16) for _ in range(2)]
    for model, size in zip(models, ("auto", 128), strict=True):
        model.train(2, batch_size=size, enable_progress_bar=False)
    one, other = (model.module.state_dict() for model in models)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_look_goes_through_no_more_than_eight_minibatches_at_a_time():
    assert [looks_at_once(size) for size in (16, 128, 4096)] == [128, 1024, 1024]


# --- what is free -------------------------------------------------------------------------------


def write(root, files):
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_what_is_free_is_the_systems_where_nothing_limits_it(tmp_path):
    assert available_bytes(tmp_path) is None
    write(tmp_path, {"proc/meminfo": "MemTotal: 90 kB\nMemAvailable:      50 kB\n"})
    assert available_bytes(tmp_path) == 50 << 10


def test_limits_of_cgroups_count_with_those_around_them(tmp_path):
    write(tmp_path, {
        "proc/meminfo": "MemAvailable: 1000000 kB\n",
        "proc/self/cgroup": "0::/outer/inner\n",
        "sys/fs/cgroup/outer/inner/memory.max": "max\n",
        "sys/fs/cgroup/outer/inner/memory.current": "70000\n",
        "sys/fs/cgroup/outer/memory.max": "100000\n",
        "sys/fs/cgroup/outer/memory.current": "80000\n",
        "sys/fs/cgroup/outer/memory.stat": "anon 5\ninactive_file 30000\nactive_file 1\n",
    })  # fmt: skip
    assert available_bytes(tmp_path) == 50_000


def test_limits_of_the_older_cgroups_count_where_the_own_folder_is_not_seen(tmp_path):
    write(tmp_path, {
        "proc/meminfo": "MemAvailable: 1000000 kB\n",
        "proc/self/cgroup": "9:name=systemd:/\n4:cpu,memory:/docker/abc\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "9000\n",
        "sys/fs/cgroup/memory/memory.usage_in_bytes": "10000\n",
        "sys/fs/cgroup/memory/memory.stat": "inactive_file 7\ntotal_inactive_file 400\n",
    })  # fmt: skip
    assert available_bytes(tmp_path) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="what is free is read from /proc")
def test_this_machine_has_some():
    assert 1 << 20 < available_bytes() < 1 << 50
