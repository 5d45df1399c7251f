"""What a trained model is asked: latents, bounds, expression, samples, checks, differential expression."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from atlasvi.de import Question, calibration, cells_of, decode_batches, differential_expression, groups_of
from atlasvi.errors import CellsError, ObsError, OptionError
from atlasvi.infer.correlation import correlation_matrix
from atlasvi.infer.decode import Request, lazy_expression
from atlasvi.infer.dropout import technical_zeros
from atlasvi.infer.elbo import elbo_blocks
from atlasvi.infer.encoded import Encoded, FromCounts, ReadCounts, Selected, Source, encode_cells
from atlasvi.infer.latent import latent_blocks
from atlasvi.infer.marginal import has_marginal, marginal_blocks
from atlasvi.infer.normalized import Weighting, normalized_expression
from atlasvi.infer.on_cluster import decode_on, encode_on, located
from atlasvi.infer.predictive import check_table, predictive_sums
from atlasvi.infer.quality import beside_like_depth, cell_quality
from atlasvi.infer.sample import (
    NeighbouringCells,
    PriorCells,
    SampledCells,
    computed_parameters,
    latent_library_size,
    likelihood_parameters,
    nearest,
    numbered,
    rows_at_once,
    sampled_matrices,
)
from atlasvi.infer.write import reader, write_expression
from atlasvi.models.arguments import (
    as_names,
    at_least_one,
    cell_positions,
    checked_library_size,
    checked_seed,
    gene_positions,
    one_of,
    refuse,
)
from atlasvi.models.core import Config, Model, Module
from atlasvi.models.data import Data
from atlasvi.progress import bar
from atlasvi.store import cluster
from atlasvi.store.atlas import Atlas, as_atlas
from atlasvi.store.atlas import open as open_atlas
from atlasvi.store.fields import Codes, as_level, level_codes, resolve
from atlasvi.store.ingest import ingest
from atlasvi.stream import Epochs
from atlasvi.types import Decodes, Encodes, LossTerms

if TYPE_CHECKING:
    import dask.array as da
    import distributed
    import pandas as pd


class Answers(Model[Config, Module]):
    """The questions; the work is in `infer` and `de`. What a module cannot answer is refused by name."""

    def get_latent_representation(
        self,
        adata: Data | None = None,
        indices: Sequence[int] | None = None,
        give_mean: bool = True,
        batch_size: int | None = None,
        return_dist: bool = False,
        *,
        seed: int = 0,
        **unsupported: object,
    ) -> Any:
        """``(n_obs, n_latent)`` float32: the mean of q(z|x) of each cell.

        Args:
            adata: other data; that of the model when ``None``. It need not have been set up.
            indices: positions of the cells wanted.
            give_mean: the mean, or one draw.
            batch_size: cells at a time; does not change the result.
            return_dist: return means and variances instead.
            seed: of the draw.
            **unsupported: refused by name.
        """
        refuse("get_latent_representation", unsupported)
        seed = checked_seed(seed)
        self._must_be_trained()
        self._must_encode()
        minibatches = self._minibatches(adata, indices, batch_size)
        pairs = list(latent_blocks(self.module, minibatches, self._device))
        loc = np.concatenate([pair[0] for pair in pairs])
        if give_mean and not return_dist:
            return loc
        scale = np.concatenate([pair[1] for pair in pairs])
        if return_dist:
            return loc, scale**2
        from atlasvi_kernels import counter_normal

        rows = torch.from_numpy(self._rows(adata, indices))
        return loc + scale * counter_normal(seed, 0, 0, rows, loc.shape[1]).numpy()

    def latent_blocks(
        self, adata: Data | None = None, batch_size: int | None = None
    ) -> Iterator[NDArray[np.float32]]:
        """The means of q(z|x) block by block, for writing where they do not fit in memory."""
        self._must_be_trained()
        self._must_encode()
        for loc, _ in latent_blocks(self.module, self._minibatches(adata, None, batch_size), self._device):
            yield loc

    def get_elbo(
        self,
        adata: Data | None = None,
        indices: Sequence[int] | None = None,
        batch_size: int | None = None,
        return_mean: bool = True,
        *,
        seed: int = 0,
        **unsupported: object,
    ) -> Any:
        """The ELBO in nats a cell (higher is better, as in scvi-tools), from one draw of z for each cell.

        Args:
            adata: other data; that of the model when ``None``.
            indices: positions of the cells.
            batch_size: cells at a time; does not change the result.
            return_mean: the mean over cells, or a value for each.
            seed: of the draws.
            **unsupported: refused by name.
        """
        refuse("get_elbo", unsupported)
        terms = self._terms(adata, indices, batch_size, seed)
        elbo = -torch.cat([term.elbo for term in terms]).double()
        return float(elbo.mean()) if return_mean else elbo.cpu().numpy()

    def get_reconstruction_error(
        self,
        adata: Data | None = None,
        indices: Sequence[int] | None = None,
        batch_size: int | None = None,
        return_mean: bool = True,
        *,
        seed: int = 0,
        **unsupported: object,
    ) -> Any:
        """``{"reconstruction_loss": -log p(x|z)}`` in nats a cell (lower is better), as in scvi-tools.

        Arguments are those of `get_elbo`.
        """
        refuse("get_reconstruction_error", unsupported)
        terms = self._terms(adata, indices, batch_size, seed)
        loss = torch.cat([term.reconstruction for term in terms]).double()
        return {"reconstruction_loss": float(loss.mean()) if return_mean else loss.cpu().numpy()}

    def encode(
        self,
        data: Data | None = None,
        *,
        cells: Any = None,
        batch_size: int | None = None,
        client: distributed.Client | None = None,
    ) -> Encoded:
        """Latents of cells with all that decoding needs besides; given in place of data, no counts are read.

        A few dozen bytes a cell are held. What is asked of it again costs less: the log-normaliser of each
        cell, posterior sample and batch is kept, so that some genes cost those genes only.

        Args:
            data: other data; that of the model when ``None``. It need not have been set up.
            cells: positions (from the end if negative), a slice or a boolean mask.
            batch_size: cells at a time; does not change the result.
            client: of a Dask cluster whose workers read and encode; see `Atlas.stream`. The model travels to
                each of them once.

        Raises:
            OptionError: a client with which this cannot be.

        Example:
            >>> cells = model.encode()
            >>> model.get_normalized_expression(cells, gene_list=["G0003"]).shape == (atlas.n_obs, 1)
            True
        """
        self._must_be_trained()
        self._must_decode()
        atlas, codes = self._data(data)
        if cells is not None:
            atlas = atlas[cell_positions(cells, atlas.n_obs)]
            codes = resolve(self.fields, atlas)
        if client is not None:
            return encode_on(client, self.module, atlas, codes)
        epochs = Epochs(atlas, codes, batch_size=self._at_once(batch_size), shuffle=False)
        return encode_cells(self.module, epochs(), codes, atlas.row_numbers, atlas.read_names)

    def expression(
        self,
        data: Data | Encoded | None = None,
        *,
        cells: Any = None,
        genes: Sequence[str] | None = None,
        transform_batch: str | Sequence[str] | None = None,
        library_size: float | str = 1,
        n_samples: int = 1,
        return_mean: bool = True,
        seed: int = 0,
        precision: str = "float32",
        memory_budget: int | str | None = None,
    ) -> da.Array:
        """Normalised expression rho as a lazy ``dask.array``, cells x genes; nothing is computed until asked.

        rho of a cell sums to one over all genes, whichever are asked for; with a size factor it is a rate and
        does not. A draw of z depends on (seed, sample, cell) alone, so no result depends on the chunks.

        Args:
            data: other data, or what `encode` made; the data of the model when ``None``. Data need not have
                been set up.
            cells: positions (from the end if negative), a slice or a boolean mask.
            genes: names of genes, in the order wanted; all when ``None``.
            transform_batch: decode as if every cell came from this batch; several are averaged.
            library_size: rho is multiplied by it; ``"latent"`` for each cell's own library size (a draw of it
                with each draw of z, where it is latent).
            n_samples: draws of z.
            return_mean: average over draws, or give each: samples x cells x genes.
            seed: of the draws.
            precision: of the product with the decoder's last layer: ``"float32"``, or ``"bfloat16"``, faster
                where the machine multiplies it: rho of a gene in a cell is then off by up to a few percent, a
                mean over a hundred cells by some tenths (docs/decoding.md).
            memory_budget: bytes, or ``"500MB"``, that the chunks in work may take; 64 MiB on two cores when
                ``None``.

        Raises:
            GenesError, ObsError: genes or batches that the model does not know, with near names.
            OptionError: ``n_samples`` below 1, or another argument out of range.
            ModelError: what `encode` made is of other weights.

        Example:
            >>> rho = model.expression(genes=["G0001", "G0002"])
            >>> float(rho[:100].mean().compute()) > 0
            True
        """
        request = self._request(
            genes,
            transform_batch,
            library_size,
            n_samples,
            return_mean=return_mean,
            seed=seed,
            precision=precision,
        )
        source, _ = self._source(data, cells)
        return lazy_expression(self.module, source, self.fields.n_vars, request, memory_budget=memory_budget)

    def write_expression(
        self,
        out: str | Path,
        data: Data | Encoded | None = None,
        *,
        cells: Any = None,
        genes: Sequence[str] | None = None,
        transform_batch: str | Sequence[str] | None = None,
        library_size: float | str = 1,
        n_samples: int = 1,
        seed: int = 0,
        precision: str = "float32",
        memory_budget: int | str | None = None,
        overwrite: bool = False,
        silent: bool = True,
        client: distributed.Client | None = None,
    ) -> None:
        """Write `expression` chunk by chunk, as X of an AnnData Zarr store.

        Args:
            out: the store.
            data: with the arguments that follow as `expression` has them.
            cells: positions, a slice or a boolean mask.
            genes: names of genes, in the order wanted; all when ``None``.
            transform_batch: decode as if every cell came from this batch; several are averaged.
            library_size: rho is multiplied by it.
            n_samples: draws of z, averaged over.
            seed: of the draws.
            precision: of the product with the decoder's last layer.
            memory_budget: of the chunks in work.
            overwrite: replace a store that is there.
            silent: show no progress bar.
            client: of a Dask cluster whose workers decode, and write: they must see ``out`` under its path.
                The model travels to each of them once.

        Raises:
            StoreError: there is something already, or it is what is read.
            SpaceError: the disk is full; nothing is left behind.

        Example:
            >>> model.write_expression("rho.zarr", genes=["G0001"], overwrite=True)
            >>> Path("rho.zarr", "X").is_dir()
            True
        """
        request = self._request(
            genes, transform_batch, library_size, n_samples, seed=seed, precision=precision
        )
        n_vars = self.fields.n_vars
        source, names = self._source(data, cells)
        rho = lazy_expression(self.module, source, n_vars, request, memory_budget=memory_budget)
        whole = data if isinstance(data, Encoded) else self._data(data)[0]
        read_names = whole.read_names if cells is None else reader(names())
        read = [path for each in (self.atlas, whole) if isinstance(each, Atlas) for path in each.paths]
        elsewhere = None
        if client is not None:
            elsewhere = partial(decode_on, client, self.module, request, n_vars, self._sent(data, cells))
        with bar("decode", rho.shape[0], "cells", enabled=not silent) as advance:
            write_expression(
                rho, read_names, list(self.fields.var_names) if genes is None else as_names(genes), Path(out),
                overwrite=overwrite, advance=advance, read=read, elsewhere=elsewhere,
            )  # fmt: skip

    def get_normalized_expression(
        self,
        adata: Data | Encoded | None = None,
        indices: Sequence[int] | None = None,
        transform_batch: str | Sequence[str] | None = None,
        gene_list: Sequence[str] | None = None,
        library_size: float | str = 1,
        n_samples: int = 1,
        n_samples_overall: int | None = None,
        weights: str | None = None,
        batch_size: int | None = None,
        return_mean: bool = True,
        return_numpy: bool | None = None,
        silent: bool = True,
        *,
        max_cells: int = 1024,
        truncation: bool = False,
        n_mc_samples: int = 500,
        seed: int = 0,
        precision: str = "float32",
        **unsupported: object,
    ) -> Any:
        """Rho as a data frame (or array): for results that fit in memory; others are refused with their size.

        Args:
            adata: other data, or what `encode` made; the data of the model when ``None``.
            indices: positions of the cells.
            transform_batch: decode as if every cell came from this batch; several are averaged.
            gene_list: names of genes.
            library_size: rho is multiplied by it; ``"latent"`` for each cell's own.
            n_samples: draws of z.
            n_samples_overall: so many rows instead of one a cell: draws of z of cells chosen at random, with
                replacement.
            weights: how they are chosen: ``"uniform"``, or ``"importance"``: draws that explain many of the
                cells more often (Boyeau et al. 2019).
            batch_size: ignored: chunks are chosen by size and do not change the result.
            return_mean: average over draws, or give each: samples x cells x genes, an array.
            return_numpy: an array instead of a data frame.
            silent: show no progress bar.
            max_cells: with importance weights: cells that they are measured on, at most.
            truncation: with importance weights: bring the smallest up to the mean (Ionides 2008).
            n_mc_samples: with importance weights: draws for the likelihood of each of these cells.
            seed: of the draws.
            precision: see `expression`.
            **unsupported: refused by name.

        Raises:
            OptionError: the result would be larger than 2 GiB; names its size and the lazy call.

        Example:
            >>> model.get_normalized_expression(indices=[3, 7], gene_list=["G0001"], n_samples=5).shape
            (2, 1)
        """
        refuse("get_normalized_expression", unsupported)
        request = self._request(
            gene_list,
            transform_batch,
            library_size,
            n_samples,
            return_mean=return_mean,
            seed=seed,
            precision=precision,
        )
        weighting = Weighting.of(weights, max_cells, truncation, n_mc_samples)
        source, names = self._source(adata, indices)
        genes = list(self.fields.var_names if gene_list is None else as_names(gene_list))
        return normalized_expression(
            self.module, source, names, genes, self.fields.n_vars, request,
            n_samples_overall=n_samples_overall, weighting=weighting, return_numpy=return_numpy,
            silent=silent,
        )  # fmt: skip

    def denoised_counts(
        self,
        data: Data | Encoded | None = None,
        *,
        cells: Any = None,
        genes: Sequence[str] | None = None,
        transform_batch: str | Sequence[str] | None = None,
        n_samples: int = 1,
        seed: int = 0,
        precision: str = "float32",
        memory_budget: int | str | None = None,
    ) -> da.Array:
        """Imputed counts as a lazy ``dask.array``, cells x genes: l rho, the mean of a count before dropout.

        To look at and to smooth, not to test hypotheses on: docs/imputation.md. Draws of such counts are
        `posterior_predictive_sample`. Arguments are those of `expression`, of which this is
        ``library_size="latent"``.

        Example:
            >>> model.denoised_counts(genes=["G0003"]).shape == (atlas.n_obs, 1)
            True
        """
        return self.expression(
            data, cells=cells, genes=genes, transform_batch=transform_batch, library_size="latent",
            n_samples=n_samples, seed=seed, precision=precision, memory_budget=memory_budget,
        )  # fmt: skip

    def technical_zeros(
        self,
        data: Data | Encoded | None = None,
        *,
        cells: Any = None,
        genes: Sequence[str] | None = None,
        transform_batch: str | None = None,
        n_samples: int = 1,
        seed: int = 0,
        memory_budget: int | str | None = None,
    ) -> da.Array:
        """Probability that a zero is technical, as a lazy ``dask.array``, cells x genes.

        It is that of dropout given the zero, pi / (pi + (1 - pi) p(y = 0)), y the count before dropout, and
        0 for counts that are not zero. Of cells that `encode` made nobody knows which are: then it is what it
        would be if all were zero.

        Args:
            data: other data, or what `encode` made; the data of the model when ``None``.
            cells: positions (from the end if negative), a slice or a boolean mask.
            genes: names of genes.
            transform_batch: as if every cell came from this batch.
            n_samples: draws of z averaged over.
            seed: of the draws.
            memory_budget: bytes, or ``"500MB"``, that the chunks in work may take.

        Raises:
            OptionError: the likelihood has no dropout.

        Example:
            >>> p = model.technical_zeros(genes=["G0003"]).compute()
            >>> bool(((p >= 0) & (p <= 1)).all())
            True
        """
        request = self._request(genes, transform_batch, "latent", n_samples, seed=seed)
        source, _ = self._source(data, cells)
        return technical_zeros(self.module, source, self.fields.n_vars, request, memory_budget)

    def posterior_predictive_sample(
        self,
        adata: Data | Encoded | None = None,
        indices: Sequence[int] | None = None,
        transform_batch: str | Sequence[str] | None = None,
        n_samples: int = 1,
        gene_list: Sequence[str] | None = None,
        batch_size: int | None = None,
        silent: bool = True,
        *,
        seed: int = 0,
        out: str | Path | None = None,
        **unsupported: object,
    ) -> Any:
        """Counts that the model would see of the cells again: z ~ q(z|x), l ~ q(l|x), then p(x | z, l).

        A count depends on (seed, sample, cell, gene) alone.

        Args:
            adata: other data, or what `encode` made; the data of the model when ``None``.
            indices: positions of the cells.
            transform_batch: sample as if every cell came from this batch; over several, the mean of the
                counts under each.
            n_samples: draws of each cell.
            gene_list: names of genes.
            batch_size: ignored: it does not change the result.
            silent: ignored.
            seed: of the draws.
            out: write an atlas there, a few cells at a time: samples one after the other.
            **unsupported: refused by name.

        Returns:
            A ``csr_matrix``, cells x genes; a list of them for several samples; with ``out``, the `Atlas`.

        Raises:
            OptionError: the result would be larger than 2 GiB.

        Example:
            >>> model.posterior_predictive_sample(indices=[3, 7]).shape == (2, atlas.n_vars)
            True
        """
        refuse("posterior_predictive_sample", unsupported)
        request = self._request(gene_list, transform_batch, "latent", n_samples, seed=seed)
        source, names = self._source(adata, indices)
        if out is not None:
            return self._drawn(source, request, names, out)
        found = sampled_matrices(self.module, source, self.fields.n_vars, request)
        return found[0] if n_samples == 1 else found

    def sample_prior(
        self,
        n_cells: int,
        data: Data | Encoded | None = None,
        *,
        transform_batch: str | None = None,
        library_size: float | str = "latent",
        genes: Sequence[str] | None = None,
        seed: int = 0,
        out: str | Path | None = None,
    ) -> Atlas:
        """Cells that nobody saw: z from its prior, then counts from p(x | z, l).

        Each takes batch, covariates and library size of a cell of the data chosen at random; a library size
        that is latent is drawn from the prior of the batch.

        Args:
            n_cells: how many.
            data: other data, or what `encode` made; the data of the model when ``None``.
            transform_batch: the batch of all of them.
            library_size: expected counts of each cell; ``"latent"`` as said above.
            genes: names of genes.
            seed: of the draws.
            out: write them to an atlas there.

        Returns:
            An atlas of cells that are drawn when they are read, or of those written at ``out``.

        Example:
            >>> cells = model.sample_prior(100)
            >>> cells.shape == (100, atlas.n_vars)
            True
        """
        request = self._request(genes, transform_batch, library_size, 1, seed=seed)
        like = data if isinstance(data, Encoded) else self.encode(data)
        code = request.batches[0] if request.batches else None
        cells = PriorCells(self.module, like, at_least_one("n_cells", n_cells), seed, code)
        return self._drawn(cells, request, lambda: numbered("prior", n_cells), out)

    def sample_neighbourhood(
        self,
        cell: int,
        n_cells: int,
        data: Data | Encoded | None = None,
        *,
        n_neighbors: int = 15,
        transform_batch: str | None = None,
        library_size: float | str = "latent",
        genes: Sequence[str] | None = None,
        seed: int = 0,
        out: str | Path | None = None,
    ) -> Atlas:
        """Unseen cells like one that is there: z from the posterior of one of its neighbours, then counts.

        Batch, covariates and library size are those of the cell.

        Args:
            cell: position of the cell.
            n_cells: how many.
            data: other data, or what `encode` made; the data of the model when ``None``.
            n_neighbors: nearest cells that z is drawn from, itself among them, by their means of z.
            transform_batch: the batch of all of them.
            library_size: expected counts of each cell; ``"latent"`` as the cell's.
            genes: names of genes.
            seed: of the draws.
            out: write them to an atlas there.

        Returns:
            An atlas of cells that are drawn when they are read, or of those written at ``out``.

        Example:
            >>> model.sample_neighbourhood(5, 20).read_rows([0, 1]).shape == (2, atlas.n_vars)
            True
        """
        request = self._request(genes, transform_batch, library_size, 1, seed=seed)
        like = data if isinstance(data, Encoded) else self.encode(data)
        like.check(self.module)
        at = int(cell_positions([cell], len(like))[0])
        neighbours = nearest(like, at, at_least_one("n_neighbors", n_neighbors))
        cells = NeighbouringCells(like, at, neighbours, at_least_one("n_cells", n_cells), seed)
        return self._drawn(cells, request, lambda: numbered(f"near-{at}", n_cells), out)

    def get_likelihood_parameters(
        self,
        adata: Data | Encoded | None = None,
        indices: Sequence[int] | None = None,
        n_samples: int = 1,
        give_mean: bool = False,
        batch_size: int | None = None,
        *,
        gene_list: Sequence[str] | None = None,
        transform_batch: str | None = None,
        seed: int = 0,
        lazy: bool = False,
        **unsupported: object,
    ) -> dict[str, Any]:
        """Parameters of p(x | z, l), as far as the likelihood has them.

        Args:
            adata: other data, or what `encode` made; the data of the model when ``None``.
            indices: positions of the cells.
            n_samples: draws of z.
            give_mean: average over draws.
            batch_size: ignored: it does not change the result.
            gene_list: names of genes.
            transform_batch: as if every cell came from this batch.
            seed: of the draws.
            lazy: ``dask.array``s, of which only the chunks asked for are computed.
            **unsupported: refused by name.

        Returns:
            ``"mean"`` (mu, before dropout), ``"dispersions"`` (theta) and ``"dropout"`` (probabilities), each
            cells x genes float32, or samples x cells x genes.

        Raises:
            OptionError: the result would be larger than 2 GiB.

        Example:
            >>> sorted(model.get_likelihood_parameters(indices=[3]))
            ['dispersions', 'dropout', 'mean']
        """
        refuse("get_likelihood_parameters", unsupported)
        request = self._request(
            gene_list,
            transform_batch,
            "latent",
            n_samples,
            seed=seed,
            return_mean=give_mean or n_samples == 1,
        )
        source, _ = self._source(adata, indices)
        found = likelihood_parameters(self.module, source, self.fields.n_vars, request)
        return dict(found) if lazy else computed_parameters(found)

    def get_latent_library_size(
        self,
        adata: Data | Encoded | None = None,
        indices: Sequence[int] | None = None,
        give_mean: bool = True,
        batch_size: int | None = None,
        *,
        seed: int = 0,
        **unsupported: object,
    ) -> NDArray[np.float32]:
        """``(n_obs, 1)`` library sizes: the mean of q(l|x), or a draw; if observed with ``give_mean=False``.

        Args:
            adata: other data, or what `encode` made; the data of the model when ``None``.
            indices: positions of the cells.
            give_mean: the mean, or one draw.
            batch_size: ignored: it does not change the result.
            seed: of the draw.
            **unsupported: refused by name.

        Raises:
            OptionError: a mean is asked of a library size that is not inferred.

        Example:
            >>> model.get_latent_library_size(give_mean=False).shape == (atlas.n_obs, 1)
            True
        """
        refuse("get_latent_library_size", unsupported)
        seed = checked_seed(seed)
        self._must_be_trained()
        self._must_decode()
        source, _ = self._source(adata, indices)
        return latent_library_size(self.module, source, self.fields.n_vars, give_mean=give_mean, seed=seed)

    def get_feature_correlation_matrix(
        self,
        adata: Data | Encoded | None = None,
        indices: Sequence[int] | None = None,
        n_samples: int = 10,
        batch_size: int = 64,
        rna_size_factor: float = 1000,
        transform_batch: str | Sequence[str] | None = None,
        correlation_type: str = "spearman",
        silent: bool = True,
        *,
        gene_list: Sequence[str] | None = None,
        seed: int = 0,
        **unsupported: object,
    ) -> pd.DataFrame:
        """Correlations between genes of w ~ Gamma(shape theta, mean l rho) over cells and draws of z.

        Genes x genes are held, never cells x genes.

        Args:
            adata: other data, or what `encode` made; the data of the model when ``None``.
            indices: positions of the cells.
            n_samples: draws of z of each cell.
            batch_size: ignored: it does not change the result.
            rna_size_factor: l of every cell.
            transform_batch: as if every cell came from this batch; of several, the mean of the correlations
                under each.
            correlation_type: ``"spearman"`` or ``"pearson"``.
            silent: ignored.
            gene_list: names of genes.
            seed: of the draws.
            **unsupported: refused by name.

        Example:
            >>> model.get_feature_correlation_matrix(gene_list=["G0001", "G0002"], n_samples=2).shape
            (2, 2)
        """
        refuse("get_feature_correlation_matrix", unsupported)
        one_of("correlation_type", correlation_type, ("spearman", "pearson"))
        request = self._request(gene_list, transform_batch, float(rna_size_factor), n_samples, seed=seed)
        source, _ = self._source(adata, indices)
        genes = list(self.fields.var_names if gene_list is None else as_names(gene_list))
        found = correlation_matrix(self.module, source, self.fields.n_vars, request, correlation_type)
        import pandas as pd

        return pd.DataFrame(found, index=genes, columns=genes)

    def cell_quality(
        self,
        adata: Data | None = None,
        indices: Sequence[int] | None = None,
        *,
        n_samples: int = 5,
        batch_size: int | None = None,
        seed: int = 0,
    ) -> pd.DataFrame:
        """How well the model reconstructs each cell, and that beside cells of its depth.

        The log-likelihood of a cell falls with its number of counts, so by itself it says little but depth;
        ``depth_score`` says how many standard deviations the error of a cell is above the median of cells
        with about as many counts: high for cells that are unlike what the model learnt.

        Args:
            adata: other data; that of the model when ``None``.
            indices: positions of the cells; depths are compared among them.
            n_samples: draws of z averaged over.
            batch_size: cells at a time; does not change the result.
            seed: of the draws.

        Returns:
            A row a cell: ``total_counts`` and ``n_genes`` of the model's genes, ``reconstruction_error``,
            -log p(x given z) in nats, and ``depth_score``.

        Raises:
            OptionError: ``n_samples`` below 1.

        Example:
            >>> found = model.cell_quality(n_samples=2)
            >>> list(found.columns)
            ['total_counts', 'n_genes', 'reconstruction_error', 'depth_score']
        """
        import pandas as pd

        self._must_decode()
        atlas, _ = self._data(adata)
        found = cell_quality(
            self.module, self._minibatches(adata, indices, batch_size), self._device,
            n_samples=at_least_one("n_samples", n_samples), seed=checked_seed(seed),
        )  # fmt: skip
        names = atlas.obs_names.astype(object)
        return pd.DataFrame(
            {
                "total_counts": found.total,
                "n_genes": found.n_genes,
                "reconstruction_error": found.error,
                "depth_score": beside_like_depth(found.error, found.total),
            },
            index=names if indices is None else names[cell_positions(indices, atlas.n_obs)],
        )

    def get_marginal_ll(
        self,
        adata: Data | None = None,
        indices: Sequence[int] | None = None,
        n_mc_samples: int = 1_000,
        batch_size: int | None = None,
        return_mean: bool = True,
        *,
        seed: int = 0,
        **unsupported: object,
    ) -> Any:
        """Log p(x) in nats a cell, by importance sampling from q(z, l | x); the ELBO is below it.

        ``log 1/S sum_s p(x, z_s, l_s) / q(z_s, l_s | x)``, which comes near from below as S grows (Burda et
        al. 2016). Streamed; a draw depends on (seed, cell, sample) alone. Of `PPCA` and `FactorAnalysis` it
        is known: nothing is drawn, and it is `get_elbo`.

        Args:
            adata: other data; that of the model when ``None``.
            indices: positions of the cells.
            n_mc_samples: S, draws for each cell.
            batch_size: cells at a time; does not change the result.
            return_mean: the mean over cells, or a value for each, ``(n,)`` float64.
            seed: of the draws.
            **unsupported: refused by name.

        Raises:
            OptionError: fewer than one draw, or a model without a posterior or a density of its prior.

        Example:
            >>> model.get_marginal_ll(n_mc_samples=20) >= model.get_elbo()
            True
        """
        refuse("get_marginal_ll", unsupported)
        n_mc_samples, seed = at_least_one("n_mc_samples", n_mc_samples), checked_seed(seed)
        self._must_be_trained()
        if self._bound_is_exact:
            return self.get_elbo(adata, indices, batch_size, return_mean, seed=seed)
        if not has_marginal(self.module):
            raise OptionError(
                f"{type(self).__name__} has no get_marginal_ll: draws of z are weighed by the density of "
                "p(z), and here none is known; get_elbo, where there is one, is a bound"
            )
        minibatches = self._minibatches(adata, indices, batch_size)
        found = torch.cat(
            list(marginal_blocks(self.module, minibatches, self._device, n_samples=n_mc_samples, seed=seed))
        )
        return float(found.mean()) if return_mean else found.numpy()

    def posterior_predictive_check(
        self,
        adata: Data | None = None,
        indices: Sequence[int] | None = None,
        *,
        groupby: str | None = None,
        gene_list: Sequence[str] | None = None,
        n_samples: int = 10,
        seed: int = 0,
    ) -> pd.DataFrame:
        """Whether counts drawn from the model look like the counts: mean, variance and zeros of each gene.

        Of every cell z is drawn from q(z|x), and counts from p(x|z, l), which makes one replicate of the
        data; statistics of ``n_samples`` replicates stand beside those of the counts (Gelman et al. 1996).
        Sums are added up as the cells are read: memory does not grow with their number.

        Args:
            adata: other data; that of the model when ``None``.
            indices: positions of the cells.
            groupby: column of obs, such as the batch: the same for the cells of each level.
            gene_list: names of genes; all when ``None``.
            n_samples: replicates.
            seed: of the draws. A count depends on (seed, replicate, cell, gene) alone.

        Returns:
            Three rows a gene (and group): ``statistic``, ``"mean"``, ``"variance"`` or ``"zero_share"``;
            ``observed``; ``replicated``, the mean over replicates, ``low`` and ``high``, their extremes;
            ``p``, the share of replicates above the observed value, half of those equal to it.

        Raises:
            OptionError: ``n_samples`` below 1.
            ModelError: the model has no distribution of counts.

        Example:
            >>> found = model.posterior_predictive_check(n_samples=3)
            >>> found[found["statistic"] == "mean"].shape == (atlas.n_vars, 6)
            True
        """
        request = self._request(gene_list, None, "latent", n_samples, seed=seed)
        atlas, _ = self._data(adata)
        codes, levels = level_codes(atlas, groupby)
        groups = codes if indices is None else codes[cell_positions(indices, atlas.n_obs)]
        names = self.fields.var_names if gene_list is None else as_names(gene_list)
        sums = predictive_sums(
            self.module, self._minibatches(adata, indices, rows_at_once(len(names))), self._device,
            groups, len(levels), self.fields.n_vars, request,
        )  # fmt: skip
        sizes = np.bincount(groups, minlength=len(levels))
        return check_table(sums, sizes, names, None if groupby is None else levels)

    def differential_expression(
        self,
        adata: Data | None = None,
        groupby: str | None = None,
        group1: str | Sequence[str] | None = None,
        group2: str | None = None,
        idx1: Any = None,
        idx2: Any = None,
        mode: str = "vanilla",
        delta: float | None = 0.25,
        batch_size: int | None = None,
        all_stats: bool = True,
        batch_correction: bool | None = None,
        batchid1: str | Sequence[str] | None = None,
        batchid2: str | Sequence[str] | None = None,
        fdr_target: float = 0.05,
        silent: bool = False,
        weights: str | None = "uniform",
        filter_outlier_cells: bool = False,
        *,
        estimator: str = "pooled",
        n_samples_overall: int = 5000,
        n_cells: int = 100,
        n_draws: int = 200,
        p_bound: float | None = None,
        bf_threshold: float = 3.0,
        pseudocounts: float | None = None,
        threshold_counts: float = 0.01,
        test_mode: str = "three",
        cred_interval_lvls: Sequence[float] = (),
        precision: str = "float32",
        seed: int = 0,
        encoded: Encoded | None = None,
        client: distributed.Client | None = None,
        **unsupported: object,
    ) -> pd.DataFrame:
        """Which genes differ between groups of cells: a row a gene and comparison, from one pass over counts.

        ``mode="vanilla"`` (Lopez et al. 2018) asks how often rho of a gene is higher in a draw of a cell of
        group 1 than in one of group 2: ``bayes_factor`` is K = log(p / (1 - p)), natural log, and a gene is
        called where K or -K is above ``bf_threshold``. ``mode="change"`` (Boyeau et al. 2019) asks how often
        the log2 fold change is beyond ``delta``, and calls genes so that the expected share of false ones is
        ``fdr_target``. Columns are scvi-tools', and ``is_de_bf_3`` in vanilla mode. With neither ``group1``
        nor ``idx1``, each level of ``groupby`` is compared with the rest, all of them in one pass.

        Args:
            adata: other data; that of the model when ``None``.
            groupby: column of obs with the groups.
            group1: levels to compare, each on its own; all when ``None``.
            group2: level to compare them with; all other cells when ``None``.
            idx1: in place of ``groupby``: cells of group 1, as positions, a mask, or a query of obs such as
                ``"cell_type == 'T' and percent_mito < 5"``.
            idx2: cells of group 2, likewise; all other cells when ``None``.
            mode: ``"vanilla"`` or ``"change"``.
            delta: log2 fold change that counts; estimated from the genes' changes when ``None``.
            batch_size: ignored: rows are decoded in pieces chosen by size and do not change the result.
            all_stats: add means and detection of the raw counts, which reads all cells of the groups.
            batch_correction: decode each draw under every batch and compare batch by batch, or each cell
                under its own. ``None``: yes for ``estimator="paper"``, else no, as scvi-tools.
            batchid1: batches to decode group 1 under; all when ``None``. Needs ``batch_correction=True``.
            batchid2: batches to decode group 2 under, the same or none of them.
            fdr_target: expected share of false calls in change mode.
            silent: show no progress bar.
            weights: of the cells of a group: ``"uniform"``.
            filter_outlier_cells: leave out the tenth of each group that is farthest out in the latent space.
            estimator: of vanilla mode: ``"pooled"`` draws from all cells of a group, as scvi-tools;
                ``"paper"`` averages K over pairs of cells, under all batches weighted by their frequency.
            n_samples_overall: draws from each group, with ``"pooled"`` and in change mode.
            n_cells: pairs of cells, with ``"paper"``.
            n_draws: draws of z for each of these pairs.
            p_bound: added to p and to 1 - p, which keeps K finite: 1e-8 with ``"pooled"``, as in scvi-tools,
                and half a draw, 0.5 / ``n_draws``, with ``"paper"``.
            bf_threshold: K or -K beyond which a gene is called in vanilla mode.
            pseudocounts: added to rho in fold changes; estimated as in scvi-tools when ``None``.
            threshold_counts: mean count below which a gene is not expressed, for that estimate.
            test_mode: ``"three"`` tells up from down, ``"two"`` takes them together.
            cred_interval_lvls: levels of credible intervals of the fold change to add.
            precision: see `expression`.
            seed: of cells, draws and pairs. A draw depends on (seed, cell, draw) alone.
            encoded: the latents of these cells, from `encode`: then no counts are read, and there can be none
                of their means (``all_stats=False``, and in change mode ``pseudocounts``).
            client: of a Dask cluster whose workers read, encode and add up; see `encode`.
            **unsupported: arguments of scvi-tools that there are not here are refused by name.

        Raises:
            ObsError: a column, a level, a batch or a query that cannot be, with near names.
            CellsError: groups that are empty or overlap.
            OptionError: another argument that cannot be.

        Example:
            >>> found = model.differential_expression(groupby="cell_type", group1="T", silent=True)
            >>> [*found.columns[:3], len(found)]
            ['proba_m1', 'proba_m2', 'bayes_factor', 30]
        """
        refuse("differential_expression", unsupported)
        self._must_decode()
        if weights not in (None, "uniform"):
            raise OptionError(f"weights={weights!r} is not supported; every cell of a group weighs the same")
        if encoded is None:
            atlas, codes = self._data(adata)
        else:
            atlas, codes = self._encoded_data(adata, encoded)
        first, second = (
            cells if cells is None or isinstance(cells, str) else cell_positions(cells, atlas.n_obs)
            for cells in (idx1, idx2)
        )
        batches1, batches2 = decode_batches(self.fields, estimator, batch_correction, batchid1, batchid2)
        question = Question(
            mode, estimator, delta, all_stats, batches1, batches2, fdr_target, filter_outlier_cells,
            n_samples_overall, n_cells, n_draws, p_bound, bf_threshold, pseudocounts, threshold_counts,
            test_mode, tuple(np.atleast_1d(cred_interval_lvls).tolist()), precision, checked_seed(seed),
        )  # fmt: skip
        groups = groups_of(atlas, groupby, group1, group2, first, second)
        with bar("differential expression", atlas.n_obs, "cells", enabled=not silent) as advance:
            return differential_expression(
                self.module, atlas, codes, self.fields.var_names, groups, question, advance, client, encoded
            )

    def calibration(
        self,
        adata: Data | None = None,
        groupby: str | None = None,
        group: str | None = None,
        idx: Any = None,
        mode: str = "vanilla",
        delta: float | None = 0.25,
        *,
        n_splits: int = 20,
        n_cells: int = 100,
        batch_correction: bool | None = None,
        fdr_target: float = 0.05,
        estimator: str = "pooled",
        n_samples_overall: int = 5000,
        n_draws: int = 200,
        bf_threshold: float = 3.0,
        seed: int = 0,
        silent: bool = True,
    ) -> pd.DataFrame:
        """How many genes `differential_expression` calls between halves of one group: none, if it is sound.

        In each split ``n_cells`` of the group, drawn at random, are compared with as many others of it.

        Args:
            adata: other data; that of the model when ``None``.
            groupby: column of obs with the group.
            group: its level.
            idx: in place of these, the cells of the group: positions, a mask or a query of obs.
            mode: ``"vanilla"`` or ``"change"``; with the arguments that follow as `differential_expression`
                has them.
            delta: log2 fold change that counts, in change mode.
            n_splits: random splits.
            n_cells: cells on each side; pairs of cells too, with ``estimator="paper"``.
            batch_correction: decode each draw under every batch.
            fdr_target: expected share of false calls, in change mode.
            estimator: ``"pooled"`` or ``"paper"``.
            n_samples_overall: draws from each side.
            n_draws: draws for each pair, with ``"paper"``.
            bf_threshold: beyond which a gene is called, in vanilla mode.
            seed: of splits and draws.
            silent: show no progress bar.

        Returns:
            A row a split: ``n_called`` genes, ``share_called`` of all, and the ``largest`` evidence, K
            without its sign or in change mode the probability of a change, with its ``gene``.

        Raises:
            CellsError: fewer than ``2 * n_cells`` cells.

        Example:
            >>> found = model.calibration(groupby="cell_type", group="T", n_splits=2, n_cells=20)
            >>> len(found), int(found["n_called"].max())
            (2, 0)
        """
        n_splits = at_least_one("n_splits", n_splits)
        self._must_decode()
        atlas, codes = self._data(adata)
        chosen = idx if idx is None or isinstance(idx, str) else cell_positions(idx, atlas.n_obs)
        cells = cells_of(atlas, groupby, group, chosen)
        batches1, batches2 = decode_batches(self.fields, estimator, batch_correction, None, None)
        question = Question(
            mode, estimator, delta, batches1=batches1, batches2=batches2, fdr_target=fdr_target,
            n_samples_overall=n_samples_overall, n_cells=n_cells, n_draws=n_draws, bf_threshold=bf_threshold,
            seed=checked_seed(seed),
        )  # fmt: skip
        with bar("calibration", n_splits, "splits", enabled=not silent) as advance:
            return calibration(
                self.module, atlas, codes, self.fields.var_names, cells, question,
                n_splits=n_splits, n_cells=n_cells, advance=advance,
            )  # fmt: skip

    # --- inside -----------------------------------------------------------------------------------

    def _must_decode(self) -> None:
        self._must_be_trained()
        if not isinstance(self.module, Encodes) or not isinstance(self.module, Decodes):
            raise OptionError(
                f"{type(self).__name__} has no expression of cells to ask for; SCVI and DCA have"
            )

    def _request(
        self,
        genes: Sequence[str] | None,
        transform_batch: str | Sequence[str] | None,
        library_size: float | str,
        n_samples: int,
        *,
        return_mean: bool = True,
        seed: int = 0,
        precision: str = "float32",
    ) -> Request:
        """What is asked, in the model's terms."""
        self._must_be_trained()
        self._must_decode()
        one_of("precision", precision, ("float32", "bfloat16"))
        at = None if genes is None else torch.from_numpy(gene_positions(genes, self.fields.var_names))
        return Request(
            None if at is None else at.to(self._device),
            self._batch_codes(transform_batch),
            checked_library_size(library_size),
            at_least_one("n_samples", n_samples), seed=checked_seed(seed), return_mean=return_mean,
            precision=precision,
        )  # fmt: skip

    def _source(self, data: Data | Encoded | None, cells: Any) -> tuple[Source, Callable[[], NDArray[Any]]]:
        """Cells to decode, and their names when they are asked for."""
        if isinstance(data, Encoded):
            data.check(self.module)
            if cells is None:
                return data, lambda: data.read_names(0, len(data))
            at = cell_positions(cells, len(data))
            return Selected(data, at), lambda: data.read_names(0, len(data))[at]
        atlas, codes = self._data(data)
        positions = None if cells is None else cell_positions(cells, atlas.n_obs)
        read = ReadCounts(atlas[:, codes.gene_columns], codes, positions)

        def names() -> NDArray[Any]:
            return atlas.obs_names if positions is None else atlas.obs_names[positions]

        return FromCounts(self.module, atlas.n_obs if positions is None else len(positions), read), names

    def _encoded_data(self, data: Data | None, encoded: Encoded) -> tuple[Atlas, Codes]:
        """Cells whose latents are known: their columns are asked for, and no counts."""
        encoded.check(self.module)
        atlas = self._data(None)[0] if data is None else as_atlas(data, layer=self.fields.layer)
        if atlas.n_obs != len(encoded):
            raise CellsError(
                f"there are latents of {len(encoded):,} cells for the {atlas.n_obs:,} of {atlas.name}"
            )
        return atlas, encoded.codes

    def _sent(self, data: Data | Encoded | None, cells: Any) -> Callable[[int, int], Any]:
        """``(start, stop) ->`` what a cluster's workers need to decode cells: latents, or where they are."""
        if isinstance(data, Encoded):
            stored, _ = self._source(data, cells)
            return lambda start, stop: stored.read(start, stop, torch.device("cpu"))
        atlas, codes = self._data(data)
        cluster.check_places(atlas)
        chosen = np.arange(atlas.n_obs) if cells is None else cell_positions(cells, atlas.n_obs)
        return lambda start, stop: located(atlas, codes, chosen[start:stop])

    def _drawn(
        self, source: Source, request: Request, names: Callable[[], NDArray[Any]], out: str | Path | None
    ) -> Atlas:
        """Counts drawn from the model, as an atlas."""
        cells = SampledCells(self.module, source, self.fields, request, names)
        if out is None:
            return Atlas(cells)
        ingest(cells, out)
        return open_atlas(out)

    def _terms(self, data: Data | None, indices: Any, batch_size: int | None, seed: int) -> list[LossTerms]:
        self._must_be_trained()
        seed = checked_seed(seed)
        minibatches = self._minibatches(data, indices, batch_size)
        return list(elbo_blocks(self.module, minibatches, self._device, seed=seed))

    def _batch_codes(self, names: str | Sequence[str] | None) -> tuple[int, ...]:
        if names is None:
            return ()
        known = list(self.fields.batch_categories)
        levels = [as_level(name) for name in np.atleast_1d(np.asarray(names, dtype=object))]
        if not levels:
            raise OptionError("transform_batch is empty; name batches, or leave it out for the cells' own")
        for level in levels:
            if level not in known:
                raise ObsError(
                    f"transform_batch {level!r} is not a batch of the model; it knows {', '.join(known)}"
                )
        return tuple(known.index(level) for level in levels)


__all__ = ["Answers"]
