import numpy as np
import pytest
import scipy.stats
import torch
from atlasvi_kernels import counter_normal, counter_reached, counter_uniform
from atlasvi_kernels.noise import _philox


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # the known answers that are published with Random123 for philox4x32 at 10 rounds
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_answers(counter, key, expected):
    words = _philox(*(np.uint32(c) for c in counter), *(np.uint32(k) for k in key))
    assert tuple(int(w) for w in words) == expected


def test_a_draw_belongs_to_its_row_however_rows_are_cut():
    rows = torch.tensor([7, 3, 1 << 40, 0])
    whole = counter_normal(5, 9, 2, rows, 11)
    for i in range(len(rows)):
        assert torch.equal(counter_normal(5, 9, 2, rows[i : i + 1], 11)[0], whole[i])
    assert torch.equal(counter_uniform(5, 9, 2, rows.flip(0), 11).flip(0), counter_uniform(5, 9, 2, rows, 11))


def test_seed_step_stream_and_row_all_matter():
    base = counter_uniform(1, 1, 1, torch.tensor([1]), 8)
    for arguments in [(2, 1, 1, 1), (1, 2, 1, 1), (1, 1, 2, 1), (1, 1, 1, 2), (1 + (1 << 32), 1, 1, 1)]:
        seed, step, stream, row = arguments
        assert not torch.equal(base, counter_uniform(seed, step, stream, torch.tensor([row]), 8))


def test_draws_follow_their_distributions():
    rows = torch.arange(4000)
    uniform = counter_uniform(0, 0, 0, rows, 25).numpy().ravel()
    normal = counter_normal(0, 0, 1, rows, 25).numpy().ravel()
    assert scipy.stats.kstest(uniform, "uniform").pvalue > 1e-3
    assert scipy.stats.kstest(normal, "norm").pvalue > 1e-3
    # Neither neighbours in a row nor neighbouring rows go together.
    table = normal.reshape(4000, 25)
    assert abs(np.corrcoef(table[:, 0], table[:, 1])[0, 1]) < 0.05
    assert abs(np.corrcoef(table[:-1, 0], table[1:, 0])[0, 1]) < 0.05


def test_numbers_out_of_range_are_refused():
    with pytest.raises(ValueError, match="seed -1"):
        counter_uniform(-1, 0, 0, torch.tensor([0]), 1)
    with pytest.raises(ValueError, match="stream 256"):
        counter_uniform(0, 0, 256, torch.tensor([0]), 1)


def test_a_step_for_each_row_gives_what_each_step_gives_alone():
    rows, steps = torch.tensor([3, 3, 8, 0]), torch.tensor([0, 5, 5, 2])
    together = counter_normal(7, steps, 1, rows, 5)
    for i in range(len(rows)):
        assert torch.equal(together[i : i + 1], counter_normal(7, int(steps[i]), 1, rows[i : i + 1], 5))
    with pytest.raises(ValueError, match="step"):
        counter_normal(7, torch.tensor([0, -1, 0, 0]), 1, rows, 5)


@pytest.mark.parametrize("n", [1, 5, 128])
@pytest.mark.parametrize("rate", [0.0, 1e-8, 0.1, 0.5, 1 - 2.0**-25])
def test_what_is_reached_is_what_the_uniform_numbers_say(n, rate):
    rows = torch.arange(300) * 7 + (1 << 33)
    kept = counter_reached(3, 4, 5, rows, n, rate)
    assert torch.equal(kept, counter_uniform(3, 4, 5, rows, n) >= rate)


def test_a_rate_of_one_or_less_than_none_is_refused():
    for rate in (1.0, -0.1):
        with pytest.raises(ValueError, match=r"rate must be in \[0, 1\)"):
            counter_reached(0, 0, 0, torch.tensor([0]), 1, rate)
