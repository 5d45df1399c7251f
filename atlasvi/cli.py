"""The command `atlasvi`. Each command opens, asks and writes; what it does is in the library."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer

if TYPE_CHECKING:
    from atlasvi.store.atlas import Atlas

app = typer.Typer(
    name="atlasvi",
    help="Probabilistic models of single-cell counts, for atlases that do not fit in memory.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)

Join = Literal["inner", "outer"]
Out = Annotated[Path, typer.Option("-o", "--out", help="Where the result goes.")]
Atlases = Annotated[
    list[str],
    typer.Argument(metavar="ATLAS...", help="An atlas, or its URL; several are taken as one."),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")]
MemoryBudget = Annotated[
    str | None, typer.Option(help="Memory for counts on their way, such as 500MB; what fits stays there.")
]
Seed = Annotated[int, typer.Option(help="Seed: the same one gives the same result.")]


@app.callback()
def options(
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="Say which choices were made.")] = False,
) -> None:
    """Options of every command."""
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format="%(message)s")


@app.command()
def ingest(
    inputs: Annotated[
        list[str],
        typer.Argument(help=".h5ad, AnnData .zarr or its URL, 10x .h5, or a Matrix Market folder."),
    ],
    out: Out,
    layer: Annotated[
        str | None, typer.Option(help="Where the counts are: a layer, or 'raw'; default X.")
    ] = None,
    join: Annotated[
        Join | None, typer.Option(help="Genes to keep from several inputs: 'inner' (default) or 'outer'.")
    ] = None,
    var_key: Annotated[
        str | None, typer.Option(help="Column of var to join genes by; default their names.")
    ] = None,
    shuffle: Annotated[bool, typer.Option("--shuffle", help="Write cells in random order.")] = False,
    seed: Seed = 0,
    input_key: Annotated[str, typer.Option(help="Column of obs that names the input of a cell.")] = "input",
    make_unique: Annotated[
        bool, typer.Option("--make-unique", help="Rename duplicate genes and cells.")
    ] = False,
    overwrite: Overwrite = False,
    append: Annotated[
        bool,
        typer.Option(
            "--append", help="Add the cells to the atlas that is there; who reads it is not disturbed."
        ),
    ] = False,
    memory_budget: Annotated[
        str, typer.Option(help="Memory for counts on their way; with room for all of them it is faster.")
    ] = "128MiB",
) -> None:
    """Make an atlas: one AnnData Zarr store from one or many files, in bounded memory.

    Example: atlasvi ingest donor1.h5ad donor2.h5ad -o atlas.zarr --shuffle
    """
    from atlasvi.progress import stage_bars
    from atlasvi.store.ingest import ingest as run

    with stage_bars("cells") as step:
        report = run(
            inputs, out, layer=layer, join=join, var_key=var_key, shuffle=shuffle,
            seed=seed, input_key=input_key, make_unique=make_unique, overwrite=overwrite, append=append,
            memory_budget=memory_budget, progress=step,
        )  # fmt: skip
    if append:
        typer.echo(f"{report.n_obs - report.n_before:,} cells added to {report.n_before:,}")
    typer.echo(f"{report.n_obs:,} cells x {report.n_vars:,} genes, {report.nnz:,} non-zeros -> {out}")
    for left in report.left_out:
        typer.echo(f"left out: {left}")


@app.command()
def info(
    places: Annotated[
        list[str],
        typer.Argument(
            metavar="PATH...", help="An atlas, its URL, or a model folder; several atlases are taken as one."
        ),
    ],
    stats: Annotated[
        bool, typer.Option("--stats", help="Read the counts of an atlas too, and sum them up.")
    ] = False,
    batch_key: Annotated[
        str | None, typer.Option(help="With --stats: column of obs to show library sizes by.")
    ] = None,
) -> None:
    """Show what is in an atlas or a model.

    Example: atlasvi info atlas.zarr --stats --batch-key donor
    """
    from rich.console import Console
    from rich.table import Table

    from atlasvi.errors import OptionError
    from atlasvi.models import class_of
    from atlasvi.models.folder import CHECKPOINT, DESCRIPTION, read_description

    if batch_key is not None and not stats:
        raise OptionError(f"--batch-key {batch_key!r} says how to show statistics; pass --stats too")
    console = Console(soft_wrap=True)
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="dim")
    table.add_column()
    path = Path(places[0])
    if len(places) == 1 and ((path / DESCRIPTION).is_file() or (path / CHECKPOINT).is_dir()):
        if stats:
            raise OptionError(f"--stats sums up counts, and {str(path)!r} is a model; leave it out")
        description = read_description(path)
        fields, records = description["fields"], description["records"]
        table.add_row("model", description["model"])
        table.add_row("genes", f"{len(fields['var_names']):,}")
        table.add_row("batches", _names(fields["batch_categories"]) if fields["batch_key"] else "none")
        for key, value in description["config"].items():
            table.add_row(key, str(value))
        table.add_row("epochs", str(len(records)))
        if records:
            loss = class_of(path).loss_name
            unit = "a cell" if loss == "squared error" else "nats a cell"
            table.add_row(f"{loss}, training", f"{records[-1]['elbo_train']:,.1f} {unit}")
            held_out = records[-1]["elbo_validation"]
            checks, kept = description.get("checks", []), (description["training"] or {}).get("kept_step")
            if kept is not None:
                held_out = next(check["elbo_validation"] for check in checks if check["step"] == kept)
                last = checks[-1]["step"]
                table.add_row("weights", f"the best on held-out cells: of step {kept:,} of {last:,}")
            if held_out is not None:
                table.add_row(f"{loss}, validation", f"{held_out:,.1f} {unit}")
        console.print(table)
        return

    import pandas as pd

    with _open(places) as atlas:
        table.add_row("cells", f"{atlas.n_obs:,}")
        table.add_row("genes", f"{atlas.n_vars:,}")
        stores = [Path(place) for place in places if Path(place).exists()]
        if len(stores) == len(places):
            files = (file for store in stores for file in (store, *store.rglob("*")))
            size = sum(file.stat().st_size for file in files if file.is_file())
            table.add_row("on disk", f"{size / 2**20:,.1f} MiB")
        table.add_row("decoded", f"{atlas.bytes_per_row * atlas.n_obs / 2**20:,.1f} MiB")
        for key in atlas.obs_keys:
            column = atlas.obs_column(key)
            what = (
                f"{len(column.categories)} levels: {_names(list(column.categories))}"
                if isinstance(column, pd.Categorical)
                else str(column.dtype)
            )
            table.add_row(f"obs {key}", what)
        for key in atlas.var_keys:
            table.add_row(f"var {key}", str(atlas.var_column(key).dtype))
        if stats:
            for row in _statistics(atlas, batch_key):
                table.add_row(*row)
    console.print(table)


def _statistics(atlas: Atlas, batch_key: str | None) -> Iterator[tuple[str, str]]:
    """What `info --stats` says, line by line."""
    import numpy as np

    from atlasvi.store.stats import KNOWN_SETS, starts_with

    has_mt = bool(starts_with(atlas.var_names, KNOWN_SETS["mt"]).any())
    found = atlas.statistics(batch_key=batch_key, gene_sets={"mt": "mt"} if has_mt else None)
    yield "counts a cell", _spread(found.total_counts)
    yield "genes a cell", _spread(found.n_genes)
    yield "non-zeros", f"{found.nnz:,}, {found.density:.2%} of the entries"
    yield "genes never seen", f"{int((found.n_cells == 0).sum()):,}"
    yield "cells without counts", f"{int((found.total_counts == 0).sum()):,}"
    share = found.mean / max(found.mean.sum(), 1e-300)
    top = np.argsort(-share, kind="stable")[:5]
    yield "most of the counts", ", ".join(f"{found.var_names[g]} {share[g]:.1%}" for g in top)
    if has_mt:
        low, middle, high = np.quantile(found.shares["mt"], [0.05, 0.5, 0.95])
        yield "mitochondrial share", f"median {middle:.1%}, 5 % to 95 %: {low:.1%} to {high:.1%}"
    moments = zip(found.library.log_mean, found.library.log_var, strict=True)
    for level, n, (mean, var) in zip(found.batches, found.batch_cells, moments, strict=True):
        name = f"{batch_key} {level}" if batch_key else "library size"
        yield name, f"{n:,} cells, log counts: mean {mean:.3f}, variance {var:.3f}"


def _spread(values: Any) -> str:
    import numpy as np

    low, middle, high = np.quantile(values, [0.05, 0.5, 0.95])
    return f"median {middle:,.0f}, 5 % to 95 %: {low:,.0f} to {high:,.0f}"


@app.command()
def train(
    ctx: typer.Context,
    atlases: Atlases,
    out: Out,
    batch_key: Annotated[str | None, typer.Option(help="Column of obs with the batch to remove.")] = None,
    labels_key: Annotated[str | None, typer.Option(help="Column of obs with labels.")] = None,
    unlabeled_category: Annotated[
        str | None, typer.Option(help="Label of the cells that have none, for scanvi.")
    ] = None,
    layer: Annotated[str | None, typer.Option(help="Where the counts are; default X.")] = None,
    size_factor_key: Annotated[str | None, typer.Option(help="Column of obs with size factors.")] = None,
    categorical_covariate: Annotated[
        list[str] | None, typer.Option(help="A further column to remove.")
    ] = None,
    continuous_covariate: Annotated[
        list[str] | None, typer.Option(help="A further column to remove.")
    ] = None,
    gene_mask: Annotated[
        str, typer.Option(help="Boolean column of var that chooses genes; 'auto' or 'none'.")
    ] = "auto",
    model: Annotated[str, typer.Option(help="scvi, linearscvi, ...")] = "scvi",
    option: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="An argument of the model, as in Python; repeat for more."),
    ] = None,
    likelihood: Annotated[str | None, typer.Option(help="zinb, nb, zip or poisson.")] = None,
    dispersion: Annotated[str | None, typer.Option(help="gene, gene-batch, gene-label or gene-cell.")] = None,
    n_latent: Annotated[int | None, typer.Option(help="Dimensions of the latent.")] = None,
    n_hidden: Annotated[int | None, typer.Option(help="Width of hidden layers.")] = None,
    n_layers: Annotated[int | None, typer.Option(help="Hidden layers.")] = None,
    prior: Annotated[str | None, typer.Option(help="Of the latent of scvi: normal, mog or vamp.")] = None,
    paper: Annotated[bool, typer.Option("--paper", help="The setting of Lopez et al. 2018.")] = False,
    max_epochs: Annotated[
        int | None, typer.Option(help="Passes over the cells; default by their number.")
    ] = None,
    batch_size: Annotated[str, typer.Option(help="Cells a minibatch, or auto: what fits memory.")] = "128",
    lr: Annotated[float | None, typer.Option(help="Learning rate; default by schedule.")] = None,
    kl_warmup_epochs: Annotated[
        int | None,
        typer.Option(help="Epochs over which the KL weight rises to 1; default by schedule."),
    ] = None,
    train_size: Annotated[float, typer.Option(help="Share of the cells to train on.")] = 0.9,
    schedule: Annotated[
        str | None, typer.Option(help="adaptive or scvi-tools; default adaptive, or the model's own.")
    ] = None,
    precision: Annotated[str, typer.Option(help="float32, or bf16 for the large products.")] = "float32",
    early_stopping: Annotated[
        bool | None,
        typer.Option("--early-stopping/--all-epochs", help="Stop when validation stalls, or not."),
    ] = None,
    accelerator: Annotated[str, typer.Option(help="auto, cpu or gpu.")] = "auto",
    seed: Seed = 0,
    memory_budget: MemoryBudget = None,
    checkpoint_every: Annotated[
        float, typer.Option(help="Seconds between checkpoints; 0: each epoch.")
    ] = 60.0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a run that was stopped.")] = False,
    overwrite: Overwrite = False,
) -> None:
    """Train scVI, or another model, on an atlas, streamed from disk.

    Writes a model folder, with a log of the ELBO terms (history.csv) and a checkpoint to resume from.

    Example: atlasvi train atlas.zarr -o model --batch-key donor
    """
    from atlasvi.errors import ModelError, OptionError
    from atlasvi.models import by_name
    from atlasvi.models.factor import FactorModel
    from atlasvi.models.folder import CHECKPOINT, DESCRIPTION, LOG, NEW_LOG, check_destination
    from atlasvi.train.history import CsvLog

    kind = by_name(model)
    given = {
        "gene_likelihood": likelihood, "dispersion": dispersion, "n_latent": n_latent, "n_hidden": n_hidden,
        "n_layers": n_layers, "prior": prior, "seed": seed,
    }  # fmt: skip
    if paper and model.lower() != "scvi":
        raise OptionError(f"--paper is the setting of scvi, not of {model}; leave it out")
    if paper:
        given |= {"use_observed_lib_size": False, "encode_covariates": True}
    options = _options_of(kind, given, option or [])
    if unlabeled_category is not None and model.lower() != "scanvi":
        raise OptionError(f"--unlabeled-category is for --model scanvi, not {model}; leave it out")
    check_destination(out)
    if not (overwrite or resume) and ((out / DESCRIPTION).exists() or (out / CHECKPOINT).exists()):
        raise ModelError(f"there is a model or a run in {str(out)!r}; pass --resume to go on, or --overwrite")
    # The log of a model that is there stays with it until there is another model.
    log = out / (NEW_LOG if (out / DESCRIPTION).exists() else LOG)
    earlier = log if log.exists() else out / LOG
    data = _open(atlases, layer)
    more = {} if unlabeled_category is None else {"unlabeled_category": unlabeled_category}
    kind.setup_anndata(
        data, **more, batch_key=batch_key, labels_key=labels_key, size_factor_key=size_factor_key,
        categorical_covariate_keys=categorical_covariate, continuous_covariate_keys=continuous_covariate,
        gene_mask=None if gene_mask == "none" else gene_mask,
    )  # fmt: skip
    trained = kind(data, **options)
    plan = {"lr": lr, "n_epochs_kl_warmup": kl_warmup_epochs}
    kept: dict[str, Any] = {
        "checkpoint": out / CHECKPOINT, "checkpoint_every_seconds": checkpoint_every, "resume": resume,
        "memory_budget": memory_budget, "on_epoch": CsvLog(log, after=earlier if resume else None),
    }  # fmt: skip
    if issubclass(kind, FactorModel):
        _refuse_what_was_given(ctx, kind.__name__, _OF_MINIBATCHES)
        trained.train(max_epochs, train_size, seed=seed, **kept)
    else:
        trained.train(
            max_epochs, accelerator, train_size=train_size,
            batch_size="auto" if batch_size == "auto" else _as_type("int", "batch_size", batch_size),
            early_stopping=early_stopping, precision=precision,
            schedule="scvi-tools" if paper and schedule is None else schedule,
            plan_kwargs={name: value for name, value in plan.items() if value is not None}, seed=seed, **kept,
        )  # fmt: skip
    trained.save(out, overwrite=True)
    last = trained.records[-1]
    held_out = "" if last.elbo_validation is None else f", {last.elbo_validation:,.1f} on held-out cells"
    if (look := trained._kept_look) is not None:
        held_out = f", {look.elbo_validation:,.1f} on held-out cells after step {look.step:,} of "
        held_out += f"{trained.checks[-1].step:,}, the best and kept"
    typer.echo(f"{len(trained.records)} epochs, {kind.loss_name} {last.elbo_train:,.1f}{held_out} -> {out}")


@app.command()
def latent(
    model: Annotated[Path, typer.Argument(help="A model folder.")],
    atlases: Atlases,
    out: Annotated[
        Path | None,
        typer.Option("-o", "--out", help="An .h5ad of the same cells to write into; default each ATLAS."),
    ] = None,
    key: Annotated[str, typer.Option(help="Key of obsm.")] = "X_scVI",
) -> None:
    """Write each cell's latent into obsm["X_scVI"], from where scanpy goes on.

    Example: atlasvi latent model atlas.zarr
    """
    from atlasvi.infer.write import write_latent
    from atlasvi.models import load
    from atlasvi.progress import bar

    trained = load(model, _open(atlases))
    trained._must_encode()
    with bar("latent", trained.atlas.n_obs, "cells") as advance:
        write_latent(trained.latent_blocks(), trained.atlas, trained.config.n_latent, out, key, advance)
    where = out or ", ".join(atlases)
    typer.echo(f"obsm[{key!r}]: {trained.atlas.n_obs:,} cells x {trained.config.n_latent} -> {where}")


@app.command()
def predict(
    model: Annotated[Path, typer.Argument(help="A model folder, of scanvi or actinn.")],
    atlases: Atlases,
    out: Out,
    threshold: Annotated[
        float, typer.Option(help="Cells whose most probable label is less probable are called unknown.")
    ] = 0.0,
    max_distance: Annotated[
        float | None,
        typer.Option(
            help="Of scanvi: cells farther from every label are called unknown; 99 % of the cells with "
            "labels are within 1 of their own."
        ),
    ] = None,
    unknown: Annotated[str, typer.Option(help="What these are called.")] = "unknown",
    overwrite: Overwrite = False,
) -> None:
    """Write a label for each cell, and the probability of each label, as .csv, .tsv or either with .gz.

    With --max-distance, also how far each cell lies from the nearest label.

    Example: atlasvi predict model atlas.zarr -o labels.csv
    """
    from atlasvi.errors import OptionError
    from atlasvi.infer.write import write_labels
    from atlasvi.models import load
    from atlasvi.progress import bar

    separator = _separator_of(out, overwrite)
    trained = load(model, _open(atlases))
    if not hasattr(trained, "labels"):
        raise OptionError(f"{type(trained).__name__} has no labels to predict; SCANVI and ACTINN have")
    far: dict[str, Any] = {}
    if max_distance is not None:
        if not hasattr(trained, "label_distances"):
            raise OptionError(f"--max-distance is of scanvi; of {type(trained).__name__} use --threshold")
        if not max_distance > 0:
            raise OptionError(f"--max-distance must be above 0, is {max_distance}")
        far = {
            "distances": lambda cells: trained.label_distances(indices=cells),
            "max_distance": max_distance,
        }
    with bar("predict", trained.atlas.n_obs, "cells") as advance:
        found = write_labels(
            lambda cells: trained.predict(indices=cells, soft=True), trained.atlas.n_obs, out, separator,
            threshold=threshold, unknown=unknown, advance=advance, **far,
        )  # fmt: skip
    most = ", ".join(f"{label} {n:,}" for label, n in found.most_common(8))
    typer.echo(f"{trained.atlas.n_obs:,} cells -> {out}: {most}{', ...' if len(found) > 8 else ''}")


@app.command()
def decode(
    model: Annotated[Path, typer.Argument(help="A model folder.")],
    atlas: Annotated[str, typer.Argument(help="An atlas, or its URL.")],
    out: Out,
    genes: Annotated[
        list[str] | None, typer.Option("-g", "--gene", help="A gene; repeat for more; default all.")
    ] = None,
    transform_batch: Annotated[
        list[str] | None, typer.Option(help="Decode as this batch; several are averaged.")
    ] = None,
    library_size: Annotated[str, typer.Option(help="rho is multiplied by it: a number, or 'latent'.")] = "1",
    n_samples: Annotated[int, typer.Option(help="Draws of z averaged over.")] = 1,
    seed: Seed = 0,
    overwrite: Overwrite = False,
) -> None:
    """Write normalised expression rho, chunk by chunk, as an AnnData Zarr store.

    Example: atlasvi decode model atlas.zarr -o rho.zarr -g CD3E -g MS4A1
    """
    from atlasvi.errors import OptionError
    from atlasvi.models import load

    try:
        library: float | str = library_size if library_size == "latent" else float(library_size)
    except ValueError:
        raise OptionError(f"--library-size {library_size!r} is neither a number nor 'latent'") from None
    if out.resolve() in (Path(atlas).resolve(), model.resolve()):
        raise OptionError(f"--out {str(out)!r} is what is read from; name another place for the result")
    trained = load(model, atlas)
    trained.write_expression(
        out, genes=genes, transform_batch=transform_batch, library_size=library, n_samples=n_samples,
        seed=seed, overwrite=overwrite, silent=False,
    )  # fmt: skip
    n_genes = len(genes or trained.fields.var_names)
    typer.echo(f"rho: {trained.atlas.n_obs:,} cells x {n_genes:,} genes -> {out}")


@app.command()
def impute(
    model: Annotated[Path, typer.Argument(help="A model folder.")],
    atlas: Annotated[str, typer.Argument(help="An atlas, or its URL.")],
    out: Out,
    genes: Annotated[
        list[str] | None, typer.Option("-g", "--gene", help="A gene; repeat for more; default all.")
    ] = None,
    transform_batch: Annotated[
        list[str] | None, typer.Option(help="Impute as if in this batch; several are averaged.")
    ] = None,
    technical_zeros: Annotated[
        bool,
        typer.Option("--technical-zeros", help="Add a layer: the probability that a zero is technical."),
    ] = False,
    n_samples: Annotated[int, typer.Option(help="Draws of z averaged over.")] = 1,
    seed: Seed = 0,
    memory_budget: Annotated[
        str | None, typer.Option(help="Memory for chunks in work, such as 500MB.")
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Write imputed counts, chunk by chunk, as an AnnData Zarr store: to look at, not to test on.

    Example: atlasvi impute model atlas.zarr -o imputed.zarr -g CD3E --technical-zeros
    """
    from atlasvi.errors import OptionError
    from atlasvi.infer.write import write_expression
    from atlasvi.models import load
    from atlasvi.progress import bar

    if out.resolve() in (Path(atlas).resolve(), model.resolve()):
        raise OptionError(f"--out {str(out)!r} is what is read from; name another place for the result")
    trained = load(model, atlas)
    how: Any = {"genes": genes, "n_samples": n_samples, "seed": seed, "memory_budget": memory_budget}
    counts = trained.denoised_counts(transform_batch=transform_batch, **how)
    layers = {}
    if technical_zeros:
        layers["technical_zero"] = trained.technical_zeros(transform_batch=transform_batch, **how)
    with bar("impute", counts.shape[0], "cells") as advance:
        names = list(genes or trained.fields.var_names)
        write_expression(
            counts, trained.atlas.read_names, names, out, overwrite=overwrite, advance=advance,
            read=trained.atlas.paths, layers=layers,
        )  # fmt: skip
    typer.echo(f"imputed counts: {counts.shape[0]:,} cells x {counts.shape[1]:,} genes -> {out}")


@app.command()
def publish(
    model: Annotated[Path, typer.Argument(help="A model folder.")],
    atlases: Atlases,
    out: Out,
    dtype: Annotated[str, typer.Option(help="Of the latents: float16 or float32.")] = "float16",
    obs: Annotated[
        list[str] | None, typer.Option(help="A column of obs to publish; repeat for more; default all.")
    ] = None,
    transform_batch: Annotated[
        list[str] | None, typer.Option(help="A batch to keep normalisers of, besides each cell's own.")
    ] = None,
    n_samples: Annotated[int, typer.Option(help="Posterior samples to keep normalisers of.")] = 1,
    overwrite: Overwrite = False,
) -> None:
    """Write all that is needed to decode an atlas, and not its counts, to one folder.

    Example: atlasvi publish model atlas.zarr -o my.atlasvi
    """
    from atlasvi.models import load
    from atlasvi.models.compact import publish as run

    trained = load(model, _open(atlases))
    run(
        trained, None, out, dtype=dtype, obs=obs, transform_batch=transform_batch or (), n_samples=n_samples,
        overwrite=overwrite,
    )  # fmt: skip
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    typer.echo(
        f"{trained.atlas.n_obs:,} cells x {trained.fields.n_vars:,} genes in {size / 2**20:,.1f} MiB -> {out}"
    )


@app.command()
def serve(
    published: Annotated[Path, typer.Argument(help="What atlasvi publish wrote.")],
    port: Annotated[int, typer.Option(help="Port of this machine; 0: any that is free.")] = 8000,
    at_once: Annotated[int, typer.Option(help="Requests answered at a time; others are told to wait.")] = 8,
) -> None:
    """Offer a published atlas to Zarr clients on this machine, read-only, until Ctrl-C.

    Example: atlasvi serve my.atlasvi --port 8000
    """
    from atlasvi.models.compact import open_compact
    from atlasvi.serve import RhoServer

    server = RhoServer(open_compact(published).store, port, at_once=at_once)
    typer.echo(f"{published} at {server.url} (layers/rho); Ctrl-C ends it")
    with server:
        server.serve_forever()


@app.command()
def de(
    model: Annotated[Path, typer.Argument(help="A model folder, or a published atlas.")],
    out: Out,
    atlases: Annotated[
        list[str] | None,
        typer.Argument(metavar="[ATLAS]...", help="The model's atlas; none with a published one."),
    ] = None,
    groupby: Annotated[str | None, typer.Option(help="Column of obs with the groups.")] = None,
    group: Annotated[
        list[str] | None,
        typer.Option(
            "--group", "--group1", help="A level to compare; repeat for more; default each of them."
        ),
    ] = None,
    versus: Annotated[
        str | None,
        typer.Option("--versus", "--group2", help="The level to compare with; default all others."),
    ] = None,
    cells: Annotated[
        str | None,
        typer.Option(
            "--cells", "--idx1", help="Instead: a query of obs, such as \"cell_type == 'T' and age < 30\"."
        ),
    ] = None,
    versus_cells: Annotated[
        str | None,
        typer.Option("--versus-cells", "--idx2", help="A query of the cells to compare with."),
    ] = None,
    mode: Annotated[
        str, typer.Option(help="'vanilla' (Bayes factors) or 'change' (fold changes).")
    ] = "vanilla",
    delta: Annotated[float, typer.Option(help="With 'change': log2 fold change that counts.")] = 0.25,
    pseudocounts: Annotated[
        float | None, typer.Option(help="With 'change': added to rho; default from the counts.")
    ] = None,
    fdr_target: Annotated[float, typer.Option(help="With 'change': expected share of false calls.")] = 0.05,
    estimator: Annotated[str, typer.Option(help="With 'vanilla': 'pooled' or 'paper'.")] = "pooled",
    batch_correction: Annotated[
        bool | None,
        typer.Option("--batch-correction/--own-batch", help="Decode under every batch, or each cell's own."),
    ] = None,
    n_samples: Annotated[int, typer.Option(help="Draws from each group.")] = 5000,
    volcano: Annotated[Path | None, typer.Option(help="Draw one comparison into this .svg.")] = None,
    heat_map: Annotated[Path | None, typer.Option(help="Draw the best genes into this .svg.")] = None,
    seed: Seed = 0,
    overwrite: Overwrite = False,
) -> None:
    """Write which genes differ between groups of cells, as .csv, .tsv or either with .gz.

    Example: atlasvi de model atlas.zarr -o markers.csv --groupby cell_type
    """
    from atlasvi.errors import OptionError
    from atlasvi.infer.compact import INDEX
    from atlasvi.models import load
    from atlasvi.models.compact import open_compact

    separator = _separator_of(out, overwrite)
    pictures = [path for path in (volcano, heat_map) if path is not None]
    for path in pictures:
        if path.suffix != ".svg":
            raise OptionError(f"{str(path)!r} names no picture that can be drawn; end it in .svg")
        _check_place(path, overwrite)
    if len({path.resolve() for path in pictures}) < len(pictures):
        raise OptionError(f"--volcano and --heat-map are both {str(volcano)!r}; name a file for each")
    if (model / INDEX).is_file():
        if atlases:
            raise OptionError(f"{str(model)!r} is a published atlas, which needs no counts: name no other")
        asked: Any = open_compact(model)
    elif atlases:
        asked = load(model, _open(atlases))
    else:
        raise OptionError(f"name the atlas whose cells are compared by the model {str(model)!r}")
    _can_draw(asked.atlas, groupby, group, versus, volcano, heat_map)
    found = asked.differential_expression(
        groupby=groupby, group1=group, group2=versus, idx1=cells, idx2=versus_cells, mode=mode, delta=delta,
        pseudocounts=pseudocounts, batch_correction=batch_correction, fdr_target=fdr_target,
        estimator=estimator, n_samples_overall=n_samples, seed=seed,
    )  # fmt: skip
    found.to_csv(out, sep=separator, index_label="gene")
    for path, chart in _charts(found, volcano, heat_map).items():
        path.write_text(chart)
    called = found[next(column for column in found if column.startswith("is_de_"))]
    typer.echo(f"{int(called.sum()):,} of {len(found):,} genes called -> {out}")


def _can_draw(
    atlas: Atlas,
    groupby: str | None,
    group: list[str] | None,
    versus: str | None,
    volcano: Path | None,
    heat_map: Path | None,
) -> None:
    """Make sure that what is compared can be drawn, before it is."""
    from atlasvi.de.groups import groups_by_label
    from atlasvi.errors import OptionError

    if groupby is None:
        if heat_map is not None:
            raise OptionError("--heat-map shows groups by name: pass --groupby, or leave --heat-map out")
        return
    if volcano is not None:
        groups = groups_by_label(atlas, groupby, group, versus)
        names = [groups.names[one] for one, _ in groups.comparisons]
        if len(names) > 1:
            raise OptionError(
                f"--volcano draws one comparison, and there are {len(names)}, of {_names(names)}; choose "
                f"one: --group {names[0]!r}, or leave --volcano out"
            )


def _charts(found: Any, volcano: Path | None, heat_map: Path | None) -> dict[Path, str]:
    """Charts of a table of differential expression, each for a file of its own."""
    from atlasvi import plots

    wanted = ((volcano, plots.volcano), (heat_map, plots.marker_heat_map))
    return {path: plots.as_file(draw(found)) for path, draw in wanted if path is not None}


@app.command()
def evaluate(
    model: Annotated[Path, typer.Argument(help="A model folder.")],
    atlases: Atlases,
    out: Annotated[
        Path, typer.Option("-o", "--out", help="A .json, or a folder for scorecard.json and scorecard.html.")
    ],
    label_key: Annotated[
        str | None,
        typer.Option(help="Column of obs with labels that should stay apart; default the model's."),
    ] = None,
    batch_key: Annotated[
        str | None, typer.Option(help="Column of obs with batches that should mix; default the model's.")
    ] = None,
    group: Annotated[
        str | None, typer.Option(help="Label whose cells are compared with each other; default the largest.")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="A fifth of the cells and draws, and no picture.")
    ] = False,
    cells: Annotated[
        int | None, typer.Option(help="Cells on which mixing and labels are measured; default 5,000.")
    ] = None,
    seed: Seed = 0,
    memory_budget: MemoryBudget = None,
    overwrite: Overwrite = False,
) -> None:
    """Write what a model is worth on an atlas: likelihood, checks, calibration, mixing, labels.

    Example: atlasvi evaluate model atlas.zarr -o scorecard --label-key cell_type
    """
    from rich.console import Console

    from atlasvi.models import load
    from atlasvi.scorecard import QUICK, THOROUGH, check_place, table
    from atlasvi.scorecard import evaluate as run

    check_place(out, overwrite=overwrite)
    effort = QUICK if quick else THOROUGH
    trained = load(model)
    with _open(atlases, trained.fields.layer) as atlas:
        card = run(
            trained, atlas, label_key=label_key, batch_key=batch_key, group=group,
            n_cells=effort.n_cells if cells is None else cells, n_held_out=effort.n_held_out,
            n_mc_samples=effort.n_mc_samples, n_replicates=effort.n_replicates, n_splits=effort.n_splits,
            picture=not quick and out.suffix != ".json", seed=seed, memory_budget=memory_budget, silent=False,
        )  # fmt: skip
    card.write(out, overwrite=overwrite)
    Console(soft_wrap=True).print(table(card))
    typer.echo(f"scorecard: {out}")


@app.command()
def convert(
    model: Annotated[Path, typer.Argument(help="A folder that scvi-tools saved, or a model folder.")],
    out: Out,
    overwrite: Overwrite = False,
) -> None:
    """Make a model folder of a SCVI, SCANVI or LinearSCVI that scvi-tools saved; or the other way, of a SCVI.

    Nothing of what scvi-tools saved is run: weights, names and options are read, and the rest is refused.

    Example: atlasvi convert scvi_tools_model -o model
    """
    from atlasvi.models import load
    from atlasvi.models.convert import from_scvi_tools, to_scvi_tools
    from atlasvi.models.folder import DESCRIPTION

    if (model / DESCRIPTION).is_file():
        trained = load(model)
        to_scvi_tools(trained, out, overwrite=overwrite)
    else:
        trained = from_scvi_tools(model)
        trained.save(out, overwrite=overwrite)
    typer.echo(f"{trained!r} -> {out}")


@app.command()
def demo(
    out: Out,
    cells: Annotated[int, typer.Option(help="Cells to simulate.")] = 50_000,
    genes: Annotated[int, typer.Option(help="Genes to simulate.")] = 2_000,
    epochs: Annotated[int, typer.Option(help="Passes over the cells.")] = 15,
    seed: Seed = 0,
) -> None:
    """Simulate an atlas with known truth, train on it, and leave a report to look at.

    Example: atlasvi demo -o demo
    """
    from atlasvi.demo import run

    report = run(out, n_obs=cells, n_vars=genes, max_epochs=epochs, seed=seed)
    typer.echo(f"report: {report}")


# Options of `train` that a model fitted by passes over the cells has no use for.
_OF_MINIBATCHES = (
    "accelerator", "batch_size", "schedule", "precision", "early_stopping", "lr", "kl_warmup_epochs",
)  # fmt: skip


def _refuse_what_was_given(ctx: typer.Context, name: str, options: tuple[str, ...]) -> None:
    from atlasvi.errors import OptionError

    for option in options:
        source = ctx.get_parameter_source(option)
        if source is not None and source.name == "COMMANDLINE":
            raise OptionError(f"{name} has no use for --{option.replace('_', '-')}; leave it out")


def _options_of(kind: Any, given: dict[str, Any], texts: list[str]) -> dict[str, Any]:
    """Arguments of a model: those given as options of their own, and as NAME=VALUE."""
    from atlasvi.errors import OptionError

    written = kind.__init__.__annotations__.items()
    types = {name: kind_of.removesuffix(" | None") for name, kind_of in written}
    types = {name: kind_of for name, kind_of in types.items() if kind_of in ("str", "int", "float", "bool")}
    options = {name: value for name, value in given.items() if value is not None}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise OptionError(f"--option {text!r} must be NAME=VALUE, such as n_latent=10")
        options[name] = value
    for name, value in options.items():
        if name not in types:
            raise OptionError(f"{kind.__name__} has no argument {name!r}; it has {', '.join(types)}")
        if isinstance(value, str):
            options[name] = _as_type(types[name], name, value)
    return options


def _as_type(kind: str, name: str, text: str) -> Any:
    from atlasvi.errors import OptionError

    if kind == "bool":
        if text.lower() not in ("true", "false"):
            raise OptionError(f"{name}={text!r} must be true or false")
        return text.lower() == "true"
    if kind in ("int", "float"):
        try:
            return int(text) if kind == "int" else float(text)
        except ValueError:
            raise OptionError(
                f"{name}={text!r} must be a{' whole' if kind == 'int' else ''} number"
            ) from None
    return text


def _separator_of(out: Path, overwrite: bool) -> str:
    """What stands between the columns of a table, by its name, where it can be written."""
    from atlasvi.errors import OptionError

    suffixes = [suffix for suffix in out.suffixes if suffix != ".gz"]
    if not suffixes or suffixes[-1] not in (".csv", ".tsv"):
        raise OptionError(f"--out {str(out)!r} names no table; end it in .csv, .tsv, .csv.gz or .tsv.gz")
    _check_place(out, overwrite)
    return "\t" if suffixes[-1] == ".tsv" else ","


def _check_place(path: Path, overwrite: bool) -> None:
    from atlasvi.errors import StoreError

    if path.exists() and not overwrite:
        raise StoreError(f"there is a {str(path)!r} already; pass --overwrite, or name another place")
    if not path.absolute().parent.is_dir():
        raise StoreError(f"there is no folder for {str(path)!r}; make it, or name another place")


def _open(places: list[str], layer: str | None = None) -> Atlas:
    """One atlas, or several as one."""
    from atlasvi.store.atlas import open as open_atlas

    return open_atlas(places[0] if len(places) == 1 else places, layer=layer)


def _names(levels: list[Any], at_most: int = 8) -> str:
    shown = ", ".join(map(str, levels[:at_most]))
    return shown if len(levels) <= at_most else f"{shown}, ... ({len(levels)} in all)"


def main() -> None:
    """Run the command: one line for an error made on purpose, exit code 1; 130 after Ctrl-C."""
    from atlasvi.errors import AtlasviError

    def show(message: Any, *_: Any, **__: Any) -> None:
        print(f"warning: {message}", file=sys.stderr)

    warnings.showwarning = show
    try:
        app()
    except (AtlasviError, OSError) as error:
        # An OSError that is not ours says what the system refused, and where.
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        _stop()
    except SystemExit as ended:
        # typer makes this of Ctrl-C.
        if ended.code == 130:
            _stop()
        raise


def _stop() -> NoReturn:
    print("stopped; what was written before is whole", file=sys.stderr)
    # Threads that are decoding ahead must not hold the exit up.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(130)


if __name__ == "__main__":
    main()
