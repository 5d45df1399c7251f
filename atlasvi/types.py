"""What travels between the folders: frozen dataclasses and the protocols that a model satisfies."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from atlasvi_kernels import CSR, counter_normal, counter_reached, counter_uniform


@dataclass(frozen=True, slots=True)
class FieldMap:
    """What a model was told about its data, resolved once: only codes travel after this.

    Args:
        var_names: names of the model's genes, in the order of its weights.
        layer: where the counts are (``None`` for ``X``, a layer's name, or ``"raw"``).
        batch_key: column of obs with the batch, or ``None`` (one batch).
        batch_categories: its levels, in the order of their codes.
        labels_key: column of obs with labels (for ``dispersion="gene-label"``), or ``None``.
        labels_categories: its levels, in the order of their codes.
        size_factor_key: column of obs with a size factor per cell, or ``None``.
        categorical_covariate_keys: further columns with levels.
        categorical_covariate_categories: their levels, column by column.
        continuous_covariate_keys: further columns with numbers.
        gene_mask: name of the boolean column of var that chose the genes, if one did.
        unlabeled_category: the label of cells that have none, the last of the labels; ``None`` where labels
            are not learnt.
        number_keys: those of the columns with levels that hold numbers or true and false, not text.
    """

    var_names: tuple[str, ...]
    layer: str | None = None
    batch_key: str | None = None
    batch_categories: tuple[str, ...] = ("0",)
    labels_key: str | None = None
    labels_categories: tuple[str, ...] = ("0",)
    size_factor_key: str | None = None
    categorical_covariate_keys: tuple[str, ...] = ()
    categorical_covariate_categories: tuple[tuple[str, ...], ...] = ()
    continuous_covariate_keys: tuple[str, ...] = ()
    gene_mask: str | None = None
    unlabeled_category: str | None = None
    number_keys: tuple[str, ...] = ()

    @property
    def n_vars(self) -> int:
        """Number of genes."""
        return len(self.var_names)

    @property
    def n_batch(self) -> int:
        """Number of batches."""
        return len(self.batch_categories)

    @property
    def n_labels(self) -> int:
        """Number of labels."""
        return len(self.labels_categories)

    @property
    def n_levels(self) -> tuple[int, ...]:
        """Number of levels of each further categorical covariate."""
        return tuple(len(levels) for levels in self.categorical_covariate_categories)

    def to_json(self) -> str:
        """As JSON text, stable from run to run."""
        return json.dumps(asdict(self), ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> FieldMap:
        """The inverse of `to_json`."""
        raw: dict[str, Any] = json.loads(text)
        raw["categorical_covariate_categories"] = tuple(
            tuple(levels) for levels in raw["categorical_covariate_categories"]
        )
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in raw.items()}
        return cls(**values)


@dataclass(frozen=True, slots=True)
class Noise:
    """Random numbers that belong to cells: a draw depends on (seed, step, cell, stream) and nothing else.

    So neither the cutting into minibatches, nor resumption, nor the number of readers changes a result.

    Args:
        seed: of the run.
        step: number of the training step, or of the posterior sample.
        rows: ``(B,)`` int64, the cells' numbers in the atlas.
    """

    seed: int
    step: int
    rows: torch.Tensor

    def normal(self, n: int, stream: int) -> torch.Tensor:
        """``(B, n)`` float32 standard normal draws; ``stream`` tells apart the uses within a step."""
        return counter_normal(self.seed, self.step, stream, self.rows, n)

    def uniform(self, n: int, stream: int) -> torch.Tensor:
        """``(B, n)`` float32 draws from (0, 1)."""
        return counter_uniform(self.seed, self.step, stream, self.rows, n)

    def kept(self, n: int, stream: int, rate: float) -> torch.Tensor:
        """``(B, n)`` bool, false with probability ``rate``: where `uniform` is ``rate`` or more."""
        return counter_reached(self.seed, self.step, stream, self.rows, n, rate)


@dataclass(frozen=True, slots=True)
class Minibatch:
    """Some cells, ready for a model: sparse counts of the model's genes, and codes.

    Args:
        counts: (B x G) `CSR`.
        rows: ``(B,)`` int64, the cells' numbers in the atlas.
        batch_index: ``(B,)`` int64.
        labels: ``(B,)`` int64.
        cat_covs: ``(B, n_cat)`` int64.
        cont_covs: ``(B, n_cont)`` float32.
        size_factor: ``(B,)`` float32, or ``None`` where none was registered.
        labelled: cells with labels that come with these in a step of training, where a model learns labels.
    """

    counts: CSR
    rows: torch.Tensor
    batch_index: torch.Tensor
    labels: torch.Tensor
    cat_covs: torch.Tensor
    cont_covs: torch.Tensor
    size_factor: torch.Tensor | None = None
    labelled: Minibatch | None = None

    def __len__(self) -> int:
        return self.counts.n_obs

    def pin_memory(self) -> Minibatch:
        """The same in page-locked memory."""
        return self._map(lambda t: t.pin_memory())

    def to(self, device: torch.device | str) -> Minibatch:
        """The same on another device. The only place where cells cross devices."""
        if torch.device(device) == self.rows.device:
            return self
        return self._map(lambda t: t.to(device, non_blocking=True))

    def take(self, at: Any) -> Minibatch:
        """Cells by their positions, ``(n,)`` int64 numpy; what comes with labels stays behind."""
        rows = torch.from_numpy(at)
        alone = replace(self, labelled=None)
        return alone._map(lambda t: t.take_rows(at) if isinstance(t, CSR) else t[rows])

    def _map(self, move: Any) -> Minibatch:
        return Minibatch(
            move(self.counts),
            move(self.rows),
            move(self.batch_index),
            move(self.labels),
            move(self.cat_covs),
            move(self.cont_covs),
            None if self.size_factor is None else move(self.size_factor),
            None if self.labelled is None else self.labelled._map(move),
        )


@dataclass(frozen=True, slots=True)
class Posterior:
    """A diagonal normal q(.|x): means and scales of B cells.

    Args:
        loc: ``(B, n)`` float32, means.
        scale: ``(B, n)`` float32, standard deviations, > 0.
    """

    loc: torch.Tensor
    scale: torch.Tensor

    def rsample(self, epsilon: torch.Tensor) -> torch.Tensor:
        """A draw, differentiable in mean and scale, from standard normal ``epsilon`` of the same shape."""
        return self.loc + self.scale * epsilon

    def kl_divergence(
        self, loc: torch.Tensor | float = 0.0, scale: torch.Tensor | float = 1.0
    ) -> torch.Tensor:
        """``(B,)`` KL(q || N(loc, scale^2)) in nats, summed over dimensions."""
        scale = torch.as_tensor(scale, dtype=self.loc.dtype, device=self.loc.device)
        ratio = (self.scale / scale).square()
        shift = ((self.loc - loc) / scale).square()
        return 0.5 * (ratio + shift - 1 - ratio.log()).sum(-1)

    def log_prob(self, z: torch.Tensor) -> torch.Tensor:
        """Log density at ``z`` in nats, summed over the last axis; the others are broadcast."""
        deviation = (z - self.loc) / self.scale
        constant = 0.5 * math.log(2 * math.pi) * z.shape[-1]
        return -0.5 * deviation.square().sum(-1) - self.scale.log().sum(-1) - constant


@dataclass(frozen=True, slots=True)
class Mixture:
    """A mixture of K diagonal normals, ``p(z) = sum over k of w_k N(z; m_k, diag v_k)``: what priors are.

    Args:
        log_weights: ``(K,)`` float32, log w; the weights sum to one.
        components: m and sqrt(v), each ``(K, n)``.
    """

    log_weights: torch.Tensor
    components: Posterior

    def log_prob(self, z: torch.Tensor) -> torch.Tensor:
        """``(B,)`` log density at ``z``, ``(B, n)``, in nats."""
        each = self.components.log_prob(z.unsqueeze(-2))
        return (self.log_weights + each).logsumexp(-1)

    def kl_divergence(self, qz: Posterior, z: torch.Tensor) -> torch.Tensor:
        """``(B,)`` KL(q || p) in nats: exact for one component, else ``log q(z) - log p(z)`` at a draw z."""
        if len(self.log_weights) == 1:
            return qz.kl_divergence(self.components.loc, self.components.scale)
        return qz.log_prob(z) - self.log_prob(z)

    def chosen(self, uniform: torch.Tensor) -> Posterior:
        """A component for each of B cells, by ``(B, 1)`` draws from (0, 1): what z is to be drawn from."""
        below = self.log_weights.exp().cumsum(0)[:-1]
        k = torch.searchsorted(below, uniform.squeeze(1))
        return Posterior(self.components.loc[k], self.components.scale[k])


@dataclass(frozen=True, slots=True)
class LossTerms:
    """The parts of the negative ELBO, cell by cell, in nats.

    Args:
        total: scalar to minimise: the mean over cells, with the KL weights of the step.
        reconstruction: ``(B,)``, -log p(x | z, l), without gradient.
        kl_z: ``(B,)``, KL(q(z|x) || p(z)), without gradient.
        kl_library: ``(B,)``, KL of the latent library size (0 where it is observed), without gradient.
        classification: ``(L,)``, weighted cross-entropy of the L cells that have a label, without gradient;
            its mean is part of ``total``.
    """

    total: torch.Tensor
    reconstruction: torch.Tensor
    kl_z: torch.Tensor
    kl_library: torch.Tensor
    classification: torch.Tensor | None = None

    @property
    def elbo(self) -> torch.Tensor:
        """``(B,)`` the *negative* ELBO at full KL weight, as scvi-tools reports it: lower is better."""
        return self.reconstruction + self.kl_z + self.kl_library


@dataclass(frozen=True, slots=True)
class CountParameters:
    """The count distribution of some genes in B cells, given their latents.

    Args:
        mu: ``(B, k)`` float32, mean before dropout.
        theta: ``(k,)`` or ``(B, k)`` float32, inverse dispersion, or ``None`` where there is none.
        pi_logits: ``(B, k)`` float32, logit of the probability of dropout, or ``None``.
    """

    mu: torch.Tensor
    theta: torch.Tensor | None
    pi_logits: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class StepWeights:
    """What the schedule says of one step.

    Args:
        kl: weight of KL(q(z|x) || p(z)).
        matmul_dtype: type that the factors of the large matrix products are rounded to.
    """

    kl: float = 1.0
    matmul_dtype: torch.dtype = torch.float32


@runtime_checkable
class Trains(Protocol):
    """A module that `train.fit` can train."""

    def loss(self, minibatch: Minibatch, noise: Noise, weights: StepWeights = ...) -> LossTerms:
        """The loss of one minibatch."""
        ...


@runtime_checkable
class HasPosterior(Protocol):
    """A module whose posterior can be fitted anew while all that is generative stays as it is."""

    posterior_parts: tuple[str, ...]
    """Names of the parts that make the posterior and nothing else; there need not be all of them."""


@runtime_checkable
class Starts(Protocol):
    """A module whose weights can start from what the genes' shares of the counts are."""

    def start_at(self, shares: torch.Tensor) -> None:
        """Take ``(G,)`` shares > 0, which sum to 1, as what is decoded before anything was learnt."""
        ...


@runtime_checkable
class Encodes(Protocol):
    """A module that `infer.latent` can ask for q(z | x)."""

    def encode(self, minibatch: Minibatch, noise: Noise | None = None) -> Posterior:
        """The posterior of the latent."""
        ...


@runtime_checkable
class Decodes(Protocol):
    """A module that `infer.decode` can ask for rho."""

    def decode_log_rho(
        self, z: torch.Tensor, minibatch: Minibatch, genes: torch.Tensor | None = None
    ) -> torch.Tensor:
        """``(B, len(genes))`` log of the normalised expression, normalised over *all* genes."""
        ...

    def library(self, minibatch: Minibatch, noise: Noise | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """``(B,)`` library size of each cell, and ``(B,)`` its KL."""
        ...


@runtime_checkable
class DecodesLinearly(Protocol):
    """A module whose rho is a softmax of a linear layer: decoded faster, and its normaliser can be kept."""

    def hidden(self, z: torch.Tensor, minibatch: Minibatch) -> torch.Tensor:
        """``(B, H)`` hidden units, what that layer takes."""
        ...

    def softmax_head(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Its ``(G, H)`` weight and ``(G,)`` bias; ``None`` where rho is no softmax after all."""
        ...


@runtime_checkable
class InfersLibrary(Protocol):
    """A module that may infer the library size."""

    library_is_latent: bool

    def encode_library(self, minibatch: Minibatch, noise: Noise | None = None) -> Posterior:
        """q(log l | x), where `library_is_latent`."""
        ...


@runtime_checkable
class GeneratesCounts(Protocol):
    """A module that `infer.sample` can draw counts from."""

    def count_parameters(
        self,
        z: torch.Tensor,
        library: torch.Tensor,
        minibatch: Minibatch,
        genes: torch.Tensor | None = None,
    ) -> CountParameters:
        """Of some genes, or of all; ``library`` is ``(B,)``."""
        ...

    def log_likelihood(self, z: torch.Tensor, library: torch.Tensor, minibatch: Minibatch) -> torch.Tensor:
        """``(B,)`` log p(x | z, l) in nats."""
        ...

    def prior(self) -> Mixture:
        """p(z)."""
        ...

    def from_prior(self, noise: Noise) -> Posterior:
        """What z of each cell of ``noise.rows`` is to be drawn from, for z to come from its prior."""
        ...


@runtime_checkable
class HasPrior(Protocol):
    """A module by whose p(z) draws of z can be weighed."""

    prior_has_density: bool
    """Whether `prior` is p(z) itself and no stand-in."""

    def prior(self) -> Mixture:
        """p(z)."""
        ...


@runtime_checkable
class Classifies(Protocol):
    """A module that `infer.classify` can ask for labels."""

    def class_logits(self, minibatch: Minibatch, noise: Noise | None = None) -> torch.Tensor:
        """``(B, n_labels)`` logits."""
        ...


__all__ = [
    "CSR",
    "Classifies",
    "CountParameters",
    "Decodes",
    "DecodesLinearly",
    "Encodes",
    "FieldMap",
    "GeneratesCounts",
    "HasPosterior",
    "HasPrior",
    "InfersLibrary",
    "LossTerms",
    "Minibatch",
    "Mixture",
    "Noise",
    "Posterior",
    "Starts",
    "StepWeights",
    "Trains",
]
