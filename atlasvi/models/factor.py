"""PCA, probabilistic PCA and factor analysis of log(1 + counts), fitted by passes over the cells.

Generative model of cell n, for y = log(1 + x) (Tipping and Bishop 1999, J. R. Stat. Soc. B 61, 611; Bishop
2006, Pattern Recognition and Machine Learning, section 12.2)::

    z_n ~ N(0, I)                                    latent, n_latent dimensions = L           (1)
    y_n ~ N(W z_n + m, Psi)                          Psi = s2 I in PPCA, diagonal in FA        (2)
    log p(x_n) = log p(y_n) - sum over g of log(1 + x_ng)          change of variables         (3)

(3) is the Jacobian of log(1 + x): with it these densities stand in one table with the likelihoods of counts.

PPCA has a closed form: with S the covariance (1/n) of y, U its L leading eigenvectors, l its eigenvalues::

    s2 = (trace S - sum of the L leading l) / (G - L),     W = U (diag(l) - s2 I)^1/2          (4)
    p(z | y) = N(M^-1 W' Psi^-1 (y - m), M^-1),            M = I + W' Psi^-1 W                 (5)

With s2 -> 0 the posterior mean is that of PCA, up to a scale of each dimension. FA is fitted by EM (Rubin and
Thayer 1982, Psychometrika 47, 69): with ``b = M^-1 W' Psi^-1``, ``C = S b'`` and ``E = M^-1 + b C``::

    W <- C E^-1,     Psi <- diag(S - W C')                                                     (6)

Each needs only m, the diagonal of S and products S Q with a narrow Q. Up to `LARGEST_COVARIANCE` genes S is
made in one pass; with more, each product is a pass over the cells, and PCA is a randomised subspace iteration
(Halko et al. 2011, SIAM Review 53, 217). The counts are sparse throughout: the mean is taken off afterwards.
"""

from __future__ import annotations

import abc
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from atlasvi_kernels import CSR
from numpy.typing import NDArray
from torch import nn

from atlasvi.errors import NotTrainedError, OptionError
from atlasvi.models.arguments import at_least_one, checked_seed, not_negative, one_of, refuse
from atlasvi.models.base import CountModel
from atlasvi.models.data import LibraryMoments, split_cells, split_options
from atlasvi.progress import bar
from atlasvi.store.identity import look
from atlasvi.stream import Epochs
from atlasvi.train.checkpoint import claim, naming_damage, read_checkpoint, write_checkpoint
from atlasvi.train.history import EpochRecord
from atlasvi.types import FieldMap, LossTerms, Minibatch, Noise, Posterior, StepWeights

if TYPE_CHECKING:
    import pandas as pd
    import scipy.sparse as sp

    from atlasvi.models.data import Data

Matrix = NDArray[np.floating]

LARGEST_COVARIANCE = 2048
_DENSE_BYTES = 16 << 20
_OVERSAMPLES = 20
_MOST_PASSES = 12
_MOST_STEPS = 1000
_LEAST_NOISE = 1e-9  # of a gene that no cell has: its density would else be infinite


@dataclass(frozen=True, slots=True)
class FactorConfig:
    """What a factor model is made of; the arguments are those of `PCA`, `PPCA` and `FactorAnalysis`."""

    n_latent: int = 50
    transform: str = "log1p"
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what the model cannot be."""
        one_of("transform", self.transform, ("log1p", "cp10k", "none"))
        at_least_one("n_latent", self.n_latent)


def transformed(counts: CSR, transform: str) -> sp.csr_matrix:
    """``(B, G)`` float64 sparse: log(1 + x), log(1 + 10,000 x / total) for ``"cp10k"``, or x."""
    matrix = counts.to_scipy().astype(np.float64)
    if transform == "none":
        return matrix
    if transform == "cp10k":
        total = np.maximum(matrix.sum(1).A1, 1)
        matrix.data *= np.repeat(1e4 / total, np.diff(matrix.indptr))
    np.log1p(matrix.data, out=matrix.data)
    return matrix


@dataclass(frozen=True)
class Moments:
    """What one pass over the cells finds.

    Args:
        mean: ``(G,)`` of y.
        variance: ``(G,)`` of y, the diagonal of S (1/n).
        log_jacobian: mean over cells of what (3) subtracts; 0 without a logarithm.
        covariance: S, up to `LARGEST_COVARIANCE` genes.
    """

    mean: Matrix
    variance: Matrix
    log_jacobian: float
    covariance: Matrix | None


Blocks = Callable[[], Iterator["sp.csr_matrix"]]


def moments(blocks: Blocks, n_vars: int, *, is_log: bool) -> Moments:
    """One pass over the cells.

    Args:
        blocks: y of all cells, some rows at a time.
        n_vars: genes.
        is_log: whether y is log(1 + x).
    """
    n, total, squares, jacobian = 0, np.zeros(n_vars), np.zeros(n_vars), 0.0
    products = np.zeros((n_vars, n_vars)) if n_vars <= LARGEST_COVARIANCE else None
    for y in blocks():
        n += y.shape[0]
        total += y.sum(0).A1
        squares += y.multiply(y).sum(0).A1
        jacobian += float(y.sum()) if is_log else 0.0
        if products is not None:
            rows = max(64, _DENSE_BYTES // (8 * n_vars))
            for start in range(0, y.shape[0], rows):
                dense = y[start : start + rows].toarray()
                products += dense.T @ dense
    mean = total / n
    covariance = None if products is None else products / n - np.outer(mean, mean)
    return Moments(mean, np.maximum(squares / n - mean**2, 0), jacobian / n, covariance)


@dataclass
class Fit:
    """A fit under way, and where it is written.

    Args:
        module: whose parameters are fitted.
        blocks: y of all cells, some rows at a time.
        n_cells: how many they are.
        most: steps at most; ``None``: as many as the model has by default.
        tol: it is over when a step gains less than this share.
        on_epoch: called with the record of each step.
        checkpoint: the folder.
        every_seconds: least time between two checkpoints.
        run: options that a resumed fit must share.
        records: of the steps so far.
        at: what the next step goes on from; empty before the first.
        is_over: whether the last step gained too little.
    """

    module: FactorModule
    blocks: Blocks
    n_cells: int
    most: int | None
    tol: float
    on_epoch: Callable[[EpochRecord], None] | None
    checkpoint: Path | None
    every_seconds: float
    run: dict[str, Any]
    records: list[EpochRecord] = field(default_factory=list)
    at: dict[str, Matrix] = field(default_factory=dict)
    is_over: bool = False

    def __post_init__(self) -> None:
        self.moments: Moments | None = None
        self.begun = self.written = time.perf_counter()

    def begin(self, *, is_log: bool) -> None:
        """The one pass that every fit begins with, unless it was resumed."""
        if self.moments is None:
            self.moments = moments(self.blocks, len(self.module.mean), is_log=is_log)
            self.save()

    @property
    def known(self) -> Moments:
        """Of the cells, after `begin`."""
        assert self.moments is not None
        return self.moments

    def times(self, q: Matrix) -> Matrix:
        """``(G, k) -> (G, k)``, S times a matrix: a pass over the cells if S is not in memory."""
        found = self.known
        if found.covariance is not None:
            product: Matrix = found.covariance @ q
            return product
        n, product = 0, np.zeros(q.shape)
        for y in self.blocks():
            n += y.shape[0]
            product += y.T @ (y @ q)
        product = product / n - np.outer(found.mean, found.mean @ q)
        return product

    def steps(self, most: int) -> Iterator[None]:
        """Those that are left of ``most``, or of as many as were asked for."""
        while len(self.records) < (self.most or most) and not self.is_over:
            yield
        self.save(at_last=True)

    def did(self, loss: float, gain: float, total: float, **at: Matrix) -> None:
        """End a step: its loss, what it gained of how much, and what the next one goes on from."""
        # In the order of memory that a file gives back, on which the rounding of products depends.
        self.at = {name: np.asarray(value, order="C") for name, value in at.items()}
        self.is_over = gain < self.tol * abs(total)
        now = time.perf_counter()
        seconds, self.begun = now - self.begun, now
        rate = self.n_cells / max(seconds, 1e-9)
        step = len(self.records)
        self.records.append(
            EpochRecord(step, loss, loss, loss, 0.0, None, None, None, 1.0, 0.0, seconds, rate)
        )
        if self.on_epoch is not None:
            self.on_epoch(self.records[-1])
        self.save()

    def save(self, *, at_last: bool = False) -> None:
        """Write it, if there is a place and the last time is long enough ago."""
        now = time.perf_counter()
        if self.checkpoint is None or not (at_last or now - self.written >= self.every_seconds):
            return
        found = self.known
        fit = {"mean": found.mean, "variance": found.variance, "log_jacobian": np.array(found.log_jacobian)}
        if not self.is_over:  # else no step comes that would need it
            fit |= {f"at.{name}": value for name, value in self.at.items()}
            fit |= {} if found.covariance is None else {"covariance": found.covariance}
        tensors = {
            "weights": self.module.state_dict(),
            "fit": {name: torch.from_numpy(value) for name, value in fit.items()},
        }
        rest = {"records": [asdict(record) for record in self.records], "is_over": self.is_over}
        write_checkpoint(self.checkpoint, tensors, rest, self.run)
        self.written = now

    def resume(self) -> None:
        """Go on from the checkpoint."""
        assert self.checkpoint is not None
        tensors, rest = read_checkpoint(self.checkpoint, self.run, ("weights", "fit"))
        with naming_damage(self.checkpoint):
            fit = {name: value.numpy() for name, value in tensors["fit"].items()}
            self.moments = Moments(
                fit["mean"], fit["variance"], float(fit["log_jacobian"]), fit.get("covariance")
            )
            self.at = {name.removeprefix("at."): v for name, v in fit.items() if name.startswith("at.")}
            self.records = [EpochRecord(**record) for record in rest["records"]]
            self.is_over = bool(rest["is_over"])
        self.module.load_state_dict(tensors["weights"])


def leading(fit: Fit, n_latent: int, seed: int) -> Iterator[tuple[Matrix, Matrix, dict[str, Any]]]:
    """Leading eigenvalues ``(L,)`` of S, falling, and eigenvectors ``(G, L)``, their largest entry > 0.

    A better estimate after each pass, and what `Fit.did` is to be told of it.

    Args:
        fit: what is known of S.
        n_latent: L.
        seed: of the random start.
    """
    n_vars = len(fit.known.mean)
    width = min(n_latent + max(_OVERSAMPLES, n_latent // 2), n_vars)
    covariance = fit.known.covariance
    for _ in fit.steps(_MOST_PASSES):
        if covariance is not None:
            values, vectors = np.linalg.eigh(covariance)
            gain, at = -math.inf, {}  # nothing is left to gain
        else:
            q = fit.at.get("q")
            if q is None:
                rng = np.random.Generator(np.random.Philox(key=seed))
                q = np.linalg.qr(rng.normal(size=(n_vars, width)))[0]
            product = fit.times(q)
            values, rotation = np.linalg.eigh(q.T @ product)
            vectors = q @ rotation
            top = values[::-1][:n_latent].sum()
            gain = float(top - fit.at.get("top", -math.inf))
            at = {"q": np.linalg.qr(product)[0], "top": np.array(top)}
        values, vectors = values[::-1][:n_latent], vectors[:, ::-1][:, :n_latent]
        signs = np.sign(vectors[np.abs(vectors).argmax(0), np.arange(n_latent)])
        yield np.maximum(values, 0), vectors * signs, {"gain": gain, "total": values.sum(), **at}


class FactorModule(nn.Module):
    """Loadings, mean and noise of a factor model, in float64; the products are with scipy, on the CPU.

    Args:
        config: sizes and choices.
        fields: what is known of the data.
        library: not used.
    """

    mean: torch.Tensor
    weight: torch.Tensor
    noise: torch.Tensor
    eigenvalues: torch.Tensor
    total_variance: torch.Tensor

    def __init__(self, config: FactorConfig, fields: FieldMap, library: LibraryMoments | None) -> None:
        super().__init__()
        self.config = config
        sizes = {
            "mean": (fields.n_vars,), "weight": (fields.n_vars, config.n_latent), "noise": (fields.n_vars,),
            "eigenvalues": (config.n_latent,), "total_variance": (),
        }  # fmt: skip
        for name, size in sizes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(size).double(), requires_grad=False))

    def centred_product(self, y: sp.csr_matrix, q: Matrix) -> Matrix:
        """``(y - m) q``."""
        product: Matrix = y @ q - self.mean.numpy() @ q
        return product

    def precision(self) -> tuple[Matrix, Matrix]:
        """``Psi^-1 W`` and M of (5)."""
        weight = self.weight.numpy()
        scaled = weight / self.noise.numpy()[:, None]
        return scaled, np.eye(weight.shape[1]) + weight.T @ scaled

    def encode(self, minibatch: Minibatch, noise: Noise | None = None) -> Posterior:
        """p(z | y) of (5): its mean, and the square roots of the diagonal of its covariance."""
        scaled, m = self.precision()
        y = transformed(minibatch.counts, self.config.transform)
        loc = np.linalg.solve(m, self.centred_product(y, scaled).T).T
        scale = np.sqrt(np.diag(np.linalg.inv(m)))
        return _posterior(loc, np.broadcast_to(scale, loc.shape))

    def loss(self, minibatch: Minibatch, noise: Noise, weights: StepWeights | None = None) -> LossTerms:
        """-log p(x), exact: nothing is drawn and there is no divergence."""
        if self.config.transform == "cp10k":
            raise OptionError(
                "counts divided by their total have no likelihood of counts; fit with transform='log1p'"
            )
        scaled, m = self.precision()
        psi, mean = self.noise.numpy(), self.mean.numpy()
        y = transformed(minibatch.counts, self.config.transform)
        squares = y.multiply(y) @ (1 / psi) - 2 * (y @ (mean / psi)) + (mean**2 / psi).sum()
        along = self.centred_product(y, scaled)
        squares -= (along * np.linalg.solve(m, along.T).T).sum(1)
        log_det = np.log(psi).sum() + np.linalg.slogdet(m)[1]
        log_p = -0.5 * (len(psi) * math.log(2 * math.pi) + log_det + squares)
        if self.config.transform == "log1p":
            log_p -= y.sum(1).A1
        terms = torch.from_numpy(-log_p)
        nothing = torch.zeros_like(terms)
        return LossTerms(terms.mean(), terms, nothing, nothing)


class PCAModule(FactorModule):
    """Eigenvectors and mean of `PCA`."""

    def encode(self, minibatch: Minibatch, noise: Noise | None = None) -> Posterior:
        """``(y - m) U``, with nothing left to chance."""
        y = transformed(minibatch.counts, self.config.transform)
        loc = self.centred_product(y, self.weight.numpy())
        return _posterior(loc, np.zeros(loc.shape))

    def loss(self, minibatch: Minibatch, noise: Noise, weights: StepWeights | None = None) -> LossTerms:
        """Refused: PCA has no likelihood."""
        raise OptionError("PCA has no likelihood; fit PPCA, which has the same subspace and one")


def _posterior(loc: Matrix, scale: Matrix) -> Posterior:
    return Posterior(torch.from_numpy(loc.astype(np.float32)), torch.from_numpy(scale.astype(np.float32)))


class FactorModel(CountModel[FactorConfig, Any], abc.ABC):
    """What `PCA`, `PPCA` and `FactorAnalysis` share: how they are fitted and what is asked of them."""

    config_type = FactorConfig
    module_type = FactorModule
    needs_many_cells: ClassVar[bool] = False
    loss_name = "-log-likelihood"
    _bound_is_exact = True

    def train(  # type: ignore[override]
        self,
        max_epochs: int | None = None,
        train_size: float | None = 0.9,
        validation_size: float | None = None,
        shuffle_set_split: bool = True,
        *,
        tol: float = 1e-8,
        enable_progress_bar: bool = True,
        seed: int = 0,
        num_workers: int | None = None,
        memory_budget: int | str | None = None,
        checkpoint: str | Path | None = None,
        checkpoint_every_seconds: float = 60.0,
        resume: bool = False,
        on_epoch: Any = None,
        **unsupported: object,
    ) -> None:
        """Fit the model by passes over the cells where they are; the counts are never dense beyond a chunk.

        Args:
            max_epochs: passes (of factor analysis with up to 2,048 genes, steps of EM after the one pass) at
                most.
            train_size: share of the cells to fit to; 0.9 when ``None``.
            validation_size: share kept for validation; the rest when ``None``.
            shuffle_set_split: choose them at random, or take the first ones.
            tol: stop when what is fitted gains less than this share.
            enable_progress_bar: show one on standard error.
            seed: of the split and of a random start.
            num_workers: threads that read; ``None``: cores less one, up to 4.
            memory_budget: bytes, or ``"500MB"``, that blocks may take; 256 MiB when ``None``.
            checkpoint: folder to write the fit to, after passes.
            checkpoint_every_seconds: least time between two checkpoints; 0 for each pass.
            resume: go on from ``checkpoint``, to the same weights as if it had never stopped.
            on_epoch: called with each `EpochRecord`.
            **unsupported: refused by name.

        Raises:
            OptionError: an argument that is wrong or not supported.
            ModelError: there is no checkpoint to go on from, or it is of another run.
        """
        refuse(f"{type(self).__name__}.train", unsupported)
        seed = checked_seed(seed)
        if max_epochs is not None:
            max_epochs = at_least_one("max_epochs", max_epochs)
        not_negative("tol", tol)
        not_negative("checkpoint_every_seconds", checkpoint_every_seconds)
        if resume and checkpoint is None:
            raise OptionError("resume=True needs checkpoint=, the folder of the run to go on with")
        atlas, codes = self._data(None)
        split = split_options(atlas.n_obs, train_size, validation_size, shuffle_set_split, seed)
        training, _, _ = split_cells(**split)
        if self.config.n_latent >= min(self.fields.n_vars, len(training)):
            raise OptionError(
                f"n_latent {self.config.n_latent} must be below the number of genes, {self.fields.n_vars}, "
                f"and of cells to train on, {len(training)}"
            )
        epochs = Epochs(
            atlas, codes, batch_size=4096, shuffle=False, positions=training, num_workers=num_workers,
            memory_budget=memory_budget,
        )  # fmt: skip
        looks_like = look(atlas[:, codes.gene_columns])
        run = {
            "model": type(self).__name__,
            "config": asdict(self.config),
            "fields": json.loads(self.fields.to_json()),
            "split": split,
            "cells": looks_like,
            "tol": tol,
        }
        with bar("fit", len(training), "cells", enabled=enable_progress_bar) as advance:

            def blocks() -> Iterator[sp.csr_matrix]:
                done = 0
                for counts, _ in epochs.counts():
                    yield transformed(counts, self.config.transform)
                    done += counts.n_obs
                    advance(done, f"pass {len(self.records) + 1}")

            fit = Fit(
                self.module, blocks, len(training), max_epochs, tol, on_epoch,
                None if checkpoint is None else Path(checkpoint), checkpoint_every_seconds, run,
            )  # fmt: skip
            if fit.checkpoint is not None:
                claim(fit.checkpoint, resume=resume)
            if resume:
                fit.resume()
            self._split, self._looks_like, self.records = split, looks_like, fit.records
            fit.begin(is_log=self.config.transform == "log1p")
            self._fit(fit)
        self._training = {"max_epochs": max_epochs, "tol": tol}

    @abc.abstractmethod
    def _fit(self, fit: Fit) -> None:
        """Set the module's parameters after each step, and end it by `Fit.did`."""

    def _set(self, **values: Matrix | float) -> None:
        for name, value in values.items():
            getattr(self.module, name).copy_(torch.as_tensor(np.asarray(value)))

    @property
    def _trained_weight(self) -> Matrix:
        if not self.records:
            raise NotTrainedError(f"this {type(self).__name__} is not trained; call train() first")
        weight: Matrix = self.module.weight.numpy()
        return weight

    def get_loadings(self) -> pd.DataFrame:
        """Genes x ``n_latent``: W, or the eigenvectors of `PCA`.

        Raises:
            NotTrainedError: before training.
        """
        import pandas as pd

        weight = self._trained_weight
        names = [f"Z_{k}" for k in range(weight.shape[1])]
        return pd.DataFrame(weight, index=list(self.fields.var_names), columns=names)


class PCA(FactorModel):
    """Principal components of log(1 + counts), out of core. Equations at the head of this file.

    Args:
        adata: an `Atlas`, the path of one, or an AnnData on which `setup_anndata` was called; columns that
            were set up play no part.
        n_latent: components.
        transform: ``"log1p"``; ``"cp10k"``, log(1 + 10,000 x / total); or ``"none"``.
        seed: of the random start where there are more than 2,048 genes.

    Raises:
        OptionError: an argument out of its range.

    Example:
        >>> PCA.setup_anndata(atlas)
        >>> model = PCA(atlas, n_latent=3)
        >>> model.train(enable_progress_bar=False)
        >>> model.get_latent_representation().shape == (atlas.n_obs, 3)
        True
    """

    module_type = PCAModule
    loss_name = "squared error"

    def __init__(self, adata: Data, n_latent: int = 50, *, transform: str = "log1p", seed: int = 0) -> None:
        super().__init__(adata, FactorConfig(n_latent, transform, seed), needs_library=False)

    def _fit(self, fit: Fit) -> None:
        found, total = fit.known, float(fit.known.variance.sum())
        for values, vectors, at in leading(fit, self.config.n_latent, self.config.seed):
            self._set(mean=found.mean, weight=vectors, eigenvalues=values, total_variance=total)
            # What a cell's reconstruction from its components lacks, squared.
            fit.did(total - float(values.sum()), **at)

    @property
    def explained_variance_ratio(self) -> Matrix:
        """``(n_latent,)`` share of the genes' summed variance along each component.

        Raises:
            NotTrainedError: before training.
        """
        _ = self._trained_weight
        ratio: Matrix = self.module.eigenvalues.numpy() / self.module.total_variance.item()
        return ratio


class PPCA(FactorModel):
    """Probabilistic PCA of log(1 + counts), by (4), out of core. Equations at the head of this file.

    Args:
        adata: an `Atlas`, the path of one, or an AnnData on which `setup_anndata` was called; columns that
            were set up play no part.
        n_latent: dimensions of the latent.
        transform: as in `PCA`; ``"cp10k"`` has no likelihood of counts.
        seed: of the random start where there are more than 2,048 genes.

    Raises:
        OptionError: an argument out of its range.

    Example:
        >>> PPCA.setup_anndata(atlas)
        >>> model = PPCA(atlas, n_latent=3)
        >>> model.train(enable_progress_bar=False)
        >>> model.get_elbo(indices=model.validation_indices) < 0  # the log-likelihood itself
        True
    """

    def __init__(self, adata: Data, n_latent: int = 10, *, transform: str = "log1p", seed: int = 0) -> None:
        super().__init__(adata, FactorConfig(n_latent, transform, seed), needs_library=False)

    def _fit(self, fit: Fit) -> None:
        found, config, total = fit.known, self.config, float(fit.known.variance.sum())
        n_vars = len(found.mean)
        n_rest = n_vars - config.n_latent
        for values, vectors, at in leading(fit, config.n_latent, config.seed):
            noise = max((total - float(values.sum())) / n_rest, _LEAST_NOISE)
            weight = vectors * np.sqrt(np.maximum(values - noise, 0))
            self._set(
                mean=found.mean, weight=weight, noise=np.full(n_vars, noise), eigenvalues=values,
                total_variance=total,
            )  # fmt: skip
            log_det = np.log(np.maximum(values, noise)).sum() + n_rest * math.log(noise)
            trace = (values / np.maximum(values, noise)).sum() + (total - values.sum()) / noise
            log_p = -0.5 * (n_vars * math.log(2 * math.pi) + log_det + trace) - found.log_jacobian
            fit.did(-float(log_p), **at)


class FactorAnalysis(FactorModel):
    """Factor analysis of log(1 + counts), by the EM of (6), out of core. Equations at the head of this file.

    Args:
        adata: an `Atlas`, the path of one, or an AnnData on which `setup_anndata` was called; columns that
            were set up play no part.
        n_latent: dimensions of the latent.
        transform: as in `PCA`; ``"cp10k"`` has no likelihood of counts.
        seed: of the random start.

    Raises:
        OptionError: an argument out of its range.

    Example:
        >>> FactorAnalysis.setup_anndata(atlas)
        >>> model = FactorAnalysis(atlas, n_latent=3)
        >>> model.train(enable_progress_bar=False)
        >>> model.get_elbo(indices=model.validation_indices) < 0  # the log-likelihood itself
        True
    """

    def __init__(self, adata: Data, n_latent: int = 10, *, transform: str = "log1p", seed: int = 0) -> None:
        super().__init__(adata, FactorConfig(n_latent, transform, seed), needs_library=False)

    def _fit(self, fit: Fit) -> None:
        found, n_latent = fit.known, self.config.n_latent
        n_vars, variance = len(found.mean), np.maximum(found.variance, _LEAST_NOISE)
        rng = np.random.Generator(np.random.Philox(key=self.config.seed))
        start = rng.normal(size=(n_vars, n_latent)) * np.sqrt(variance / n_latent)[:, None]
        for _ in fit.steps(_MOST_STEPS):
            weight, psi = fit.at.get("weight", start), fit.at.get("psi", variance)
            scaled = weight / psi[:, None]
            m = np.eye(n_latent) + weight.T @ scaled
            b = np.linalg.solve(m, scaled.T)
            c = fit.times(b.T)
            log_det = np.log(psi).sum() + np.linalg.slogdet(m)[1]
            trace = (found.variance / psi).sum() - (m * (b @ c)).sum()
            log_p = -0.5 * float(n_vars * math.log(2 * math.pi) + log_det + trace) - found.log_jacobian
            self._set(mean=found.mean, weight=weight, noise=psi, total_variance=found.variance.sum())
            weight = np.linalg.solve(np.linalg.inv(m) + b @ c, c.T).T
            psi = np.maximum(found.variance - (weight * c).sum(1), _LEAST_NOISE)
            gain = log_p - float(fit.at.get("log_p", -math.inf))
            fit.did(-log_p, gain, log_p, weight=weight, psi=psi, log_p=np.array(log_p))


__all__ = ["PCA", "PPCA", "FactorAnalysis", "FactorConfig", "FactorModel", "FactorModule"]
