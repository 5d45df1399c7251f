"""Penalties on batches in the latent: the distance by its sum over pairs, and who learns what of a critic."""

import itertools
import math

import numpy as np
import pytest
import torch

from atlasvi.errors import OptionError
from atlasvi.metrics import entropy_of_batch_mixing
from atlasvi.models.scvi import SCVI
from atlasvi.nn.critics import BatchCritic, mmd
from atlasvi.types import Noise


def by_hand(z, batch):
    """Every pair of cells, one after another."""
    distance = [[sum((a - b) ** 2 for a, b in zip(p, q, strict=True)) for q in z] for p in z]
    d = np.mean(distance)

    def k(i, j):
        return np.mean([math.exp(-distance[i][j] / (2 * w * d)) for w in (0.01, 0.1, 1, 10, 100)])

    def mean(s, t):
        cells = itertools.product(np.flatnonzero(batch == s), np.flatnonzero(batch == t))
        return np.mean([k(i, j) for i, j in cells])

    pairs = list(itertools.combinations(sorted(set(batch)), 2))
    return np.mean([mean(s, s) + mean(t, t) - 2 * mean(s, t) for s, t in pairs])


@pytest.mark.parametrize("batches", [[0, 0, 1, 0, 1, 1, 1], [0, 3, 2, 3, 0, 2, 2], [1, 0, 0, 0, 0, 0, 0]])
def test_mmd_is_its_sum_over_pairs(batches):
    z, batch = torch.randn(7, 3, dtype=torch.double), torch.tensor(batches)
    assert float(mmd(z, batch, 5)) == pytest.approx(by_hand(z.tolist(), batch.numpy()), rel=1e-9)


def test_mmd_has_a_gradient_and_is_nothing_within_one_batch():
    z = torch.randn(6, 2, dtype=torch.double, requires_grad=True)
    batch = torch.tensor([0, 1, 0, 1, 1, 0])
    mmd(z, batch, 2).backward()
    assert z.grad.abs().sum() > 0
    same = torch.cat([z.detach(), z.detach()])
    assert float(mmd(same, torch.arange(12) // 6, 2)) == pytest.approx(0, abs=1e-12)
    assert float(mmd(z, torch.zeros(6, dtype=torch.int64), 2)) == 0
    moved = torch.cat([z.detach(), z.detach() + 3])
    assert float(mmd(moved, torch.arange(12) // 6, 2)) > 0.1


def test_the_critic_learns_to_guess_and_z_to_confuse_it():
    critic, batch = BatchCritic(3, 8, 2), torch.tensor([0, 1, 1, 0])
    z = torch.randn(4, 3, requires_grad=True)
    logits = critic.out(torch.relu(critic.hidden(z)))
    guess, confusion = critic(z, batch)
    torch.testing.assert_close(guess, torch.nn.functional.cross_entropy(logits, batch))
    uniform = torch.nn.functional.cross_entropy(logits, torch.full((4, 2), 0.5))
    torch.testing.assert_close(confusion, uniform)
    of_critic = torch.autograd.grad(guess + 5 * confusion, critic.out.weight, retain_graph=True)
    plain = torch.nn.functional.cross_entropy(logits, batch)
    torch.testing.assert_close(of_critic, torch.autograd.grad(plain, critic.out.weight, retain_graph=True))
    of_z = torch.autograd.grad(guess + confusion, z)
    torch.testing.assert_close(of_z, torch.autograd.grad(uniform, z))


@pytest.mark.parametrize("kind", ["adversary", "mmd"])
def test_a_latent_that_is_moved_by_a_penalty_mixes(kind):
    batch = torch.arange(200) % 2
    z = torch.nn.Parameter(torch.randn(200, 2) + 2.0 * batch.unsqueeze(1))
    critic = BatchCritic(2, 16, 2)
    optimizer = torch.optim.Adam([z, *critic.parameters()], lr=0.05)

    def mixing():
        return entropy_of_batch_mixing(z.detach().numpy(), batch.numpy(), seed=0, n_repeats=5).entropy

    before = mixing()
    for _ in range(120):
        loss = mmd(z, batch, 2) if kind == "mmd" else sum(critic(z, batch))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert before < 0.35
    assert mixing() > before + 0.2  # of log 2 = 0.69 at most


@pytest.mark.parametrize("penalty", [{"adversary": 3.0}, {"mmd": 5.0}], ids=str)
def test_a_penalty_is_added_to_what_is_minimised(penalty, adata, tmp_path):
    SCVI.setup_anndata(adata, batch_key="batch", gene_mask=None)
    plain = SCVI(adata, n_hidden=16, n_latent=3, dropout_rate=0.0)
    model = SCVI(adata, n_hidden=16, n_latent=3, dropout_rate=0.0, **penalty)
    model.module.load_state_dict(plain.module.state_dict(), strict=False)
    minibatch = next(model._minibatches(None, None, None))
    noise = Noise(0, 0, minibatch.rows)
    with torch.no_grad():
        qz = plain.module.encode(minibatch)
        z = qz.rsample(noise.normal(3, 0))
        guess, confusion = model.module.critic(z, minibatch.batch_index) if "adversary" in penalty else (0, 0)
        expected = guess + 3 * confusion if "adversary" in penalty else 5 * mmd(z, minibatch.batch_index, 2)
        found = model.module.loss(minibatch, noise).total - plain.module.loss(minibatch, noise).total
    assert float(found) == pytest.approx(float(expected), rel=1e-3)
    model.train(2, batch_size=64, enable_progress_bar=False)
    model.save(tmp_path / "m")
    again = SCVI.load(tmp_path / "m", adata)
    np.testing.assert_array_equal(again.get_latent_representation(), model.get_latent_representation())


def test_a_penalty_needs_batches(adata):
    SCVI.setup_anndata(adata, gene_mask=None)
    with pytest.raises(OptionError, match="batch_key="):
        SCVI(adata, mmd=1.0)
    SCVI.setup_anndata(adata, batch_key="batch", gene_mask=None)
    with pytest.raises(OptionError, match="adversary"):
        SCVI(adata, adversary=-1.0)
