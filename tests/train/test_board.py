"""What TensorBoard is told is what the history says."""

import sys
import types

import pytest

from atlasvi.errors import OptionError
from atlasvi.models.scvi import SCVI
from atlasvi.train import TensorBoard


class Writer:
    """Keeps what it is given, in place of `torch.utils.tensorboard.SummaryWriter`."""

    made: list["Writer"] = []  # noqa: RUF012 - emptied by the fixture

    def __init__(self, folder, purge_step=None):
        self.folder, self.purge_step, self.scalars, self.said = folder, purge_step, {}, []
        Writer.made.append(self)

    def add_scalar(self, name, value, step):
        assert (name, step) not in self.scalars, "each is written once"
        self.scalars[name, step] = value

    def flush(self):
        self.said.append("flush")

    def close(self):
        self.said.append("close")


@pytest.fixture
def writers(monkeypatch):
    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    Writer.made.clear()
    return Writer.made


@pytest.fixture
def model(adata):
    SCVI.setup_anndata(adata, gene_mask=None)
    return SCVI(adata, n_hidden=16, n_latent=3)


def train(model, epochs, board, **options):
    model.train(epochs, batch_size=64, enable_progress_bar=False, on_epoch=board, on_check=board, **options)


def test_each_epoch_and_look_is_written_once_by_step(model, writers, tmp_path):
    board = TensorBoard(tmp_path / "run")
    assert not writers, "nothing is opened before there is something to write"
    train(model, 3, board)
    board.close()
    (writer,) = writers
    assert writer.folder == str(tmp_path / "run")
    assert writer.said[-2:] == ["flush", "close"]
    assert len(model.validation_history) == len(model.records) == 3
    for record in model.records:
        assert writer.scalars["epoch/elbo_train", record.step] == record.elbo_train
        assert writer.scalars["epoch/lr", record.step] == record.lr
    for look in model.checks:
        assert writer.scalars["look/elbo_validation", look.step] == look.elbo_validation
    assert not [name for name, _ in writer.scalars if name.endswith("/step")]


def test_a_run_that_goes_on_takes_back_what_was_written_after_its_checkpoint(model, adata, writers, tmp_path):
    board = TensorBoard(tmp_path)
    run = {"checkpoint": tmp_path / "run", "checkpoint_every_seconds": 1e9}
    train(model, 2, board, **run)
    again = SCVI(adata, n_hidden=16, n_latent=3)
    train(again, 3, TensorBoard(tmp_path), **run, resume=True)
    first, second = writers
    assert second.purge_step == min(step for _, step in second.scalars) > max(s for _, s in first.scalars)


def test_cells_without_validation_have_no_such_scalars(model, writers, tmp_path):
    train(model, 1, TensorBoard(tmp_path), train_size=1.0)
    assert not [name for name, _ in writers[0].scalars if "validation" in name]


def test_without_the_package_it_says_so_at_once(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(OptionError, match=r"pip install 'atlasvi\[tensorboard\]'"):
        TensorBoard(tmp_path)


@pytest.mark.filterwarnings("default")  # of packages that it brings
def test_tensorboard_reads_what_was_written(model, tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    board = TensorBoard(tmp_path / "run")
    train(model, 2, board)
    board.close()
    events = reader.EventAccumulator(str(tmp_path / "run"))
    events.Reload()
    found = events.Scalars("epoch/elbo_train")
    assert [event.step for event in found] == [record.step for record in model.records]
    assert [event.value for event in found] == pytest.approx([r.elbo_train for r in model.records])
