"""Records of epochs, as frames and as a CSV that outlives its process."""

import csv

import pandas as pd
import pytest
import torch

from atlasvi.train.history import CsvLog, EpochRecord, TermSums, to_frames
from atlasvi.types import LossTerms


def record(epoch, validation=1.5):
    return EpochRecord(
        epoch, 3.0, 2.0 + epoch, 1.0, 0.5, validation, validation, validation, 0.1, 1e-3, 0.2, 100.0
    )


def test_frames_have_scvi_tools_names_and_the_epoch_as_index():
    frames = to_frames([record(0), record(1)])
    wanted = {
        "train_loss_epoch", "elbo_train", "reconstruction_loss_train", "kl_local_train",
        "elbo_validation", "reconstruction_loss_validation", "kl_local_validation", "kl_weight",
    }  # fmt: skip
    assert wanted <= frames.keys()
    expected = pd.DataFrame({"elbo_train": [2.0, 3.0]}, index=pd.Index([0, 1], name="epoch"))
    pd.testing.assert_frame_equal(frames["elbo_train"], expected)


def test_a_quantity_that_was_never_measured_has_no_frame():
    assert "elbo_validation" not in to_frames([record(0, None)])
    some = to_frames([record(0, None), record(1, 2.5)])["elbo_validation"]["elbo_validation"]
    assert some.isna().tolist() == [True, False]


def test_sums_are_means_over_cells_and_not_over_minibatches():
    sums = TermSums()
    for n, value in ((3, 1.0), (1, 5.0)):
        each = torch.full((n,), value)
        sums.add(LossTerms(torch.tensor(value), each, 2 * each, 3 * each))
    assert sums.means() == pytest.approx((2.0, 12.0, 2.0, 10.0))


def test_labelled_cells_count_alike_in_whatever_minibatch():
    sums = TermSums()
    for n, value, classification in ((3, 1.0, [6.0, 2.0]), (1, 5.0, []), (4, 0.0, [1.0])):
        each, labels = torch.full((n,), value), torch.tensor(classification)
        total = torch.tensor(value) + (labels.mean() if len(labels) else 0)
        sums.add(LossTerms(total, each, 0 * each, 0 * each, labels))
    assert sums.means() == pytest.approx((1.0 + 3.0, 1.0, 1.0, 0.0))


def read(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_the_log_can_be_read_after_each_epoch(tmp_path):
    log = CsvLog(tmp_path / "new" / "history.csv")
    for epoch in range(3):
        log(record(epoch, None if epoch == 1 else 1.5))
        lines = read(log.path)
        assert [int(line["epoch"]) for line in lines] == list(range(epoch + 1))
    assert lines[1]["elbo_validation"] == ""
    assert float(lines[2]["elbo_train"]) == 4.0
    assert [p.name for p in log.path.parent.iterdir()] == ["history.csv"]


def test_a_resumed_log_has_each_epoch_once(tmp_path):
    path = tmp_path / "history.csv"
    first = CsvLog(path)
    for epoch in range(5):
        first(record(epoch))
    second = CsvLog(path, after=path)
    for epoch in (3, 4, 5):
        second(record(epoch, 7.0))
    lines = read(path)
    assert [int(line["epoch"]) for line in lines] == [0, 1, 2, 3, 4, 5]
    assert [float(line["elbo_validation"]) for line in lines] == [1.5, 1.5, 1.5, 7.0, 7.0, 7.0]


def test_a_fresh_log_forgets_what_was_there(tmp_path):
    path = tmp_path / "history.csv"
    CsvLog(path)(record(9))
    CsvLog(path)(record(0))
    assert [line["epoch"] for line in read(path)] == ["0"]
