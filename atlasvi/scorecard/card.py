"""What a scorecard holds, and the same as JSON: without a date or path, the same run gives the same bytes."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atlasvi.errors import ModelError, OptionError, StoreError, VersionError
from atlasvi.files import replacing_folder

if TYPE_CHECKING:
    import pandas as pd

    from atlasvi.report import Embedding

FORMAT = 1
JSON, PAGE = "scorecard.json", "scorecard.html"


@dataclass(frozen=True, slots=True)
class Likelihood:
    """How well the model foretells counts, in nats a cell.

    Args:
        name: of what its loss is the negative: ``"ELBO"``, or ``"log-likelihood"`` where nothing is a bound.
        kept_apart: whether these cells were kept apart from training.
        which: which cells, and why these, in a sentence.
        n_cells: number of them.
        zero_share: share of zeros among their counts of the model's genes.
        elbo: mean over the cells of log p(x, z) - log q(z | x) at full KL weight, one draw a cell; higher is
            better.
        elbo_error: standard error of that mean.
        reconstruction: mean of -log p(x | z).
        kl: mean of the divergences, of z and of the library size.
        marginal: mean of log p(x) by importance sampling, or ``None``.
        marginal_elbo: the ELBO of the cells that the marginal was taken on.
        marginal_cells: number of these.
        marginal_draws: draws for each.
    """

    name: str
    kept_apart: bool
    which: str
    n_cells: int
    zero_share: float
    elbo: float
    elbo_error: float | None
    reconstruction: float
    kl: float
    marginal: float | None = None
    marginal_elbo: float | None = None
    marginal_cells: int = 0
    marginal_draws: int = 0

    @property
    def zero_word(self) -> str:
        """What the share of zeros says of the likelihood."""
        if self.zero_share >= 0.9:
            return (
                f"{self.zero_share:.1%} of these counts are zero: nearly all of the likelihood is how well "
                "zeros are foretold, so by itself it says little of the rest"
            )
        return f"{self.zero_share:.1%} of these counts are zero; the more are, the less a likelihood says"


@dataclass(frozen=True, slots=True)
class GeneGap:
    """A gene of which counts drawn from the model are far off.

    Args:
        gene: its name.
        statistic: ``"mean"``, ``"variance"`` or ``"zero_share"``.
        observed: of the counts.
        replicated: mean over the replicates.
    """

    gene: str
    statistic: str
    observed: float
    replicated: float


@dataclass(frozen=True, slots=True)
class Check:
    """Counts drawn from the model beside the counts, of all cells or of a batch.

    Args:
        group: the batch, or ``None`` for all cells.
        n_cells: number of cells.
        zeros: observed share of zeros of all entries.
        zeros_replicated: the same, of the replicates.
        zeros_gap: mean over the genes of the difference of their shares of zeros, without its sign.
        n_detected: genes that at least one cell in twenty has.
        mean_ratio: median over these of replicated over observed mean; ``None`` without any.
        variance_ratio: the same of the variance.
        mean_beyond: share of the genes whose observed mean is beyond that of every replicate.
        variance_beyond: the same of the variance.
        zeros_beyond: the same of the share of zeros.
    """

    group: str | None
    n_cells: int
    zeros: float
    zeros_replicated: float
    zeros_gap: float
    n_detected: int
    mean_ratio: float | None
    variance_ratio: float | None
    mean_beyond: float
    variance_beyond: float
    zeros_beyond: float


@dataclass(frozen=True, slots=True)
class Predictive:
    """Posterior predictive checks.

    Args:
        n_replicates: replicates of the cells.
        n_genes: genes.
        all_cells: the check of all cells.
        batches: the check of each batch, if there is more than one.
        farthest: the genes farthest off, of the variance and of the share of zeros.
    """

    n_replicates: int
    n_genes: int
    all_cells: Check
    batches: tuple[Check, ...]
    farthest: tuple[GeneGap, ...]

    @property
    def by_chance(self) -> float:
        """Share of the genes that is beyond all replicates where the model is right."""
        return 2 / (self.n_replicates + 1)


@dataclass(frozen=True, slots=True)
class Split:
    """What is called between two random halves of a group.

    Args:
        n_called: genes.
        share_called: of all genes.
        largest: evidence, |K| in nats.
        gene: that has it.
    """

    n_called: int
    share_called: float
    largest: float
    gene: str


@dataclass(frozen=True, slots=True)
class Calibration:
    """Differential expression where there is none: random cells of a group against others of it.

    Args:
        group: the label, or ``None`` for cells of any kind.
        n_group: cells that it has.
        n_each: cells on each side.
        threshold: |K| beyond which a gene is called, in nats.
        share_called: of the genes, mean over the splits; 0 if it is sound.
        largest: the largest |K| in any split, in nats.
        splits: one after the other.
    """

    group: str | None
    n_group: int
    n_each: int
    threshold: float
    share_called: float
    largest: float
    splits: tuple[Split, ...]


@dataclass(frozen=True, slots=True)
class LatentScore:
    """One latent: how batches mix in it, and how labels hold together. ``None`` where there are none.

    Args:
        name: of the method.
        entropy: of the batches among the nearest neighbours, in nats.
        entropy_spread: its standard deviation over repeats.
        batch_silhouette: mean silhouette width of the batches; ideal 0.
        ari: of k-means clusters with the labels.
        nmi: likewise, with the geometric mean of the entropies.
        label_silhouette: mean silhouette width of the labels; ideal 1.
    """

    name: str
    entropy: float | None
    entropy_spread: float | None
    batch_silhouette: float | None
    ari: float | None
    nmi: float | None
    label_silhouette: float | None


@dataclass(frozen=True, slots=True)
class Latents:
    """The model's latent and that of PCA, on the same cells.

    Args:
        n_cells: a seeded sample.
        n_labelled: of these, cells that have a label.
        n_dims: of each latent.
        batch_key: column of obs.
        n_batches: in the sample.
        ceiling: entropy of the batches in the sample, which full mixing reaches.
        n_neighbors: that are looked at.
        label_key: column of obs.
        n_labels: in the sample, and clusters of k-means.
        scores: the model, then PCA.
    """

    n_cells: int
    n_labelled: int
    n_dims: int
    batch_key: str | None
    n_batches: int
    ceiling: float | None
    n_neighbors: int
    label_key: str | None
    n_labels: int
    scores: tuple[LatentScore, ...]


@dataclass(frozen=True, slots=True)
class Provenance:
    """From what it was made.

    Args:
        counts_sha256: of all counts of the model's genes: `atlasvi.store.identity.Checksum`.
        weights_sha256: of the weights as safetensors: that of the model folder's ``weights.safetensors``.
        order_seed: of the split and the order of training, or ``None`` where the model does not say.
        is_shuffled: whether the store was ingested in random order.
        versions: of atlasvi and of what decides numbers.
        options: what `evaluate` was told.
    """

    counts_sha256: str
    weights_sha256: str
    order_seed: int | None
    is_shuffled: bool
    versions: dict[str, str]
    options: dict[str, Any]


@dataclass(frozen=True, slots=True)
class NotApplicable:
    """A part that this model, or these data, have no answer to.

    Args:
        part: as a person would call it.
        reason: why.
    """

    part: str
    reason: str


@dataclass(frozen=True, slots=True)
class Pictures:
    """What only the page shows: too much for JSON.

    Args:
        check: of all cells, from `CountModel.posterior_predictive_check`; or ``None``.
        by_batch: of each batch, with ``groupby``; or ``None``.
        embedding: a 2-D view of the model's latent; or ``None``.
    """

    check: pd.DataFrame | None = None
    by_batch: pd.DataFrame | None = None
    embedding: Embedding | None = None


@dataclass(frozen=True, slots=True)
class Scorecard:
    """What a model is worth on an atlas; made by `evaluate`.

    Numbers are rounded to six digits, in which no machine differs. A part that is ``None`` stands in
    ``not_applicable`` with the reason.

    Args:
        model: name of the class.
        config: its arguments.
        atlas: name of the data, without its folder.
        n_obs: cells of the atlas.
        n_vars: genes of the model.
        likelihood: of counts it has not seen.
        predictive: counts drawn from it, beside the counts.
        calibration: of differential expression.
        latents: mixing of batches and conservation of labels.
        not_applicable: parts it has no answer to.
        provenance: from what.
        pictures: for the page; not in the JSON, and of no account when two are compared.

    Example:
        >>> import atlasvi
        >>> card = atlasvi.evaluate(model, label_key="cell_type", n_splits=1, picture=False)
        >>> Scorecard.from_json(card.to_json()) == card
        True
    """

    model: str
    config: dict[str, Any]
    atlas: str
    n_obs: int
    n_vars: int
    likelihood: Likelihood | None
    predictive: Predictive | None
    calibration: Calibration | None
    latents: Latents | None
    not_applicable: tuple[NotApplicable, ...]
    provenance: Provenance
    pictures: Pictures = field(default_factory=Pictures, compare=False, repr=False)

    def to_json(self) -> str:
        """As text, stable from run to run."""
        parts = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "pictures"}
        plain = {name: asdict(part) if hasattr(part, "__slots__") else part for name, part in parts.items()}
        plain["not_applicable"] = [asdict(one) for one in self.not_applicable]
        return json.dumps({"format": FORMAT, **plain}, indent=1, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Scorecard:
        """The inverse of `to_json`; without pictures.

        Raises:
            ModelError: it is not a scorecard.
            VersionError: a newer atlasvi wrote it.
        """
        try:
            raw = json.loads(text)
            written = int(raw.pop("format"))
            if written > FORMAT:
                raise VersionError(
                    f"the scorecard has format {written}, this atlasvi reads up to {FORMAT}; upgrade it"
                )
            return cls(**{name: _PARTS.get(name, _as_it_is)(value) for name, value in raw.items()})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(
                f"this is not a scorecard of atlasvi ({error}); make one: atlasvi evaluate"
            ) from error

    def to_html(self) -> str:
        """As a page that stands alone, with plots."""
        from atlasvi.scorecard.page import scorecard_html

        return scorecard_html(self)

    def write(self, out: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write the JSON to a file that ends in ``.json``, or JSON and page to a folder of any other name.

        Raises:
            StoreError: there is something already, or no folder for it; it cannot be written.
            OptionError: a name that is neither.

        Example:
            >>> import atlasvi
        >>> card = atlasvi.evaluate(model, n_splits=1, picture=False)
            >>> card.write("card", overwrite=True)
            >>> sorted(path.name for path in Path("card").iterdir())
            ['scorecard.html', 'scorecard.json']
        """
        from atlasvi.report import write_text

        path = Path(out)
        check_place(path, overwrite=overwrite)
        if path.suffix == ".json":
            write_text(path, self.to_json())
            return
        page = self.to_html()
        with replacing_folder(path) as new:
            write_text(new / JSON, self.to_json())
            write_text(new / PAGE, page)


def check_place(path: Path, *, overwrite: bool) -> None:
    """See that a scorecard may be written there, before the work is done.

    Raises:
        StoreError: there is something already, or no folder for it.
        OptionError: a name that is neither a folder's nor that of a JSON file.
    """
    if path.suffix in (".html", ".htm", ".svg", ".csv", ".txt"):
        raise OptionError(
            f"{path.name!r} names no scorecard; end it in .json, or name a folder for {JSON} and {PAGE}"
        )
    if not path.absolute().parent.is_dir():
        raise StoreError(f"there is no folder for {str(path)!r}; make it, or name another place")
    if not path.exists():
        return
    if path.is_dir() != (path.suffix != ".json"):
        raise StoreError(f"{str(path)!r} is a {'folder' if path.is_dir() else 'file'}; name another place")
    if path.is_dir():
        strangers = sorted(p.name for p in path.iterdir() if p.name not in (JSON, PAGE))
        if strangers:
            raise StoreError(
                f"{str(path)!r} holds {strangers[0]!r}, which is no scorecard's; name another folder"
            )
    if not overwrite:
        raise StoreError(f"there is a {str(path)!r} already; pass overwrite, or name another place")


def _as_it_is(value: Any) -> Any:
    return value


def _likelihood(raw: dict[str, Any] | None) -> Likelihood | None:
    return None if raw is None else Likelihood(**raw)


def _predictive(raw: dict[str, Any] | None) -> Predictive | None:
    if raw is None:
        return None
    batches = tuple(Check(**check) for check in raw.pop("batches"))
    farthest = tuple(GeneGap(**gap) for gap in raw.pop("farthest"))
    return Predictive(all_cells=Check(**raw.pop("all_cells")), batches=batches, farthest=farthest, **raw)


def _calibration(raw: dict[str, Any] | None) -> Calibration | None:
    return (
        None if raw is None else Calibration(splits=tuple(Split(**one) for one in raw.pop("splits")), **raw)
    )


def _latents(raw: dict[str, Any] | None) -> Latents | None:
    return (
        None if raw is None else Latents(scores=tuple(LatentScore(**one) for one in raw.pop("scores")), **raw)
    )


_PARTS: dict[str, Any] = {
    "likelihood": _likelihood,
    "predictive": _predictive,
    "calibration": _calibration,
    "latents": _latents,
    "not_applicable": lambda raw: tuple(NotApplicable(**one) for one in raw),
    "provenance": lambda raw: Provenance(**raw),
}
