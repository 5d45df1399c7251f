"""The page of a scorecard, in the looks of `atlasvi.report`: one HTML file that stands alone."""

from __future__ import annotations

from html import escape

from atlasvi import plots
from atlasvi.report import bar_cell, figure, header, latent_section, page, section
from atlasvi.scorecard.card import Check, Latents, LatentScore, Likelihood, Predictive, Scorecard

# Genes drawn in a panel, and batches whose panels are there to unfold.
_GENES, _GENES_EACH, _BATCHES = 4_000, 1_000, 8
_STATISTICS = {"mean": "mean", "variance": "variance", "zero_share": "share of zeros"}


def scorecard_html(card: Scorecard) -> str:
    """The page as text."""
    parts = (
        _head(card),
        _likelihood(card),
        _view(card),
        _latents(card.latents),
        _predictive(card),
        _calibration(card),
        _not_applicable(card),
        _provenance(card),
    )
    return page(_title(card), "\n".join(parts), style=_STYLE)


def _view(card: Scorecard) -> str:
    keys = (card.latents.label_key, card.latents.batch_key) if card.latents is not None else (None, None)
    return latent_section(card.pictures.embedding, keys[0] or "label", keys[1] or "batch")


def _title(card: Scorecard) -> str:
    return f"{card.model} on {card.atlas.removesuffix('.zarr').removesuffix('.h5ad')}"


def summary(card: Scorecard) -> str:
    """The scorecard in a sentence or two."""
    said = []
    if card.likelihood is not None:
        whose = "cells kept apart from training" if card.likelihood.kept_apart else "all cells"
        name = card.likelihood.name
        said.append(f"{name} {_number(card.likelihood.elbo)} nats a cell on {whose}")
    found = card.latents
    if found is not None:
        own, pca = found.scores
        if own.ari is not None and pca.ari is not None:
            said.append(
                f"clusters agree with {found.label_key} by an ARI of {own.ari:.2f} (PCA: {pca.ari:.2f})"
            )
        if own.entropy is not None and pca.entropy is not None and found.ceiling:
            said.append(
                f"batches mix to {own.entropy / found.ceiling:.0%} of what is possible (PCA: "
                f"{pca.entropy / found.ceiling:.0%})"
            )
    if card.calibration is not None:
        whom = card.calibration.group if card.calibration.group is not None else "the cells"
        said.append(
            f"{card.calibration.share_called:.1%} of the genes are called between random halves of {whom}"
        )
    text = "; ".join(said) or "None of what a scorecard measures applies to this model"
    return f"{text[0].upper()}{text[1:]}."


def _head(card: Scorecard) -> str:
    figures = [(f"{card.n_obs:,}", "cells"), (f"{card.n_vars:,}", "genes")]
    if card.likelihood is not None:
        figures.append((_number(card.likelihood.elbo), f"{card.likelihood.name}, nats a cell"))
    if card.latents is not None:
        own = card.latents.scores[0]
        if own.ari is not None:
            figures.append((f"{own.ari:.2f}", "ARI with labels"))
        if own.entropy is not None and card.latents.ceiling:
            figures.append((f"{own.entropy / card.latents.ceiling:.0%}", "of full mixing"))
    if card.calibration is not None:
        figures.append((f"{card.calibration.share_called:.1%}", "false calls"))
    return header(_title(card), summary(card), figures)


def _number(value: float) -> str:
    return f"{value:,.1f}".replace("-", "−")


def _facts(rows: list[tuple[str, str]], caption: str) -> str:
    body = "".join(f'<tr><th scope="row">{name}</th><td>{value}</td></tr>' for name, value in rows)
    return f'<table class="facts"><caption class="hidden">{caption}</caption><tbody>{body}</tbody></table>'


def _table(head: list[str], rows: list[str], caption: str, kind: str) -> str:
    names = "".join(f'<th scope="col">{name}</th>' for name in head)
    return (
        f'<div class="scroll"><table class="{kind}"><caption class="hidden">{caption}</caption>'
        f"<thead><tr>{names}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


# --- likelihood ---------------------------------------------------------------------------------


def _likelihood(card: Scorecard) -> str:
    found = card.likelihood
    if found is None:
        return ""
    title = "Held-out likelihood" if found.kept_apart else "Likelihood, not held out"
    notes = (
        f"<p class=note><strong>{escape(found.which)}</strong> {escape(found.zero_word)}.</p>"
        "<p class=note>Higher is better for the ELBO and the marginal, lower for the reconstruction error. "
        "They compare models on the same genes and cells, and no others.</p>"
    )
    return section(
        title, f'<div class="halves"><div>{_likelihood_facts(found)}</div><div>{notes}</div></div>'
    )


def _likelihood_facts(found: Likelihood) -> str:
    error = "" if found.elbo_error is None else f" ± {found.elbo_error:,.1f}"
    rows = [
        ("Cells", f"{found.n_cells:,}"),
        (f"{found.name}, nats a cell", f"<b>{_number(found.elbo)}</b>{error}"),
        ("Reconstruction error", _number(found.reconstruction)),
        ("Divergence from the prior", _number(found.kl)),
    ]
    if found.marginal is not None and found.marginal_elbo is not None:
        some = "" if found.marginal_cells == found.n_cells else f", {found.marginal_cells:,} cells"
        rows.append((f"Marginal, {found.marginal_draws:,} draws{some}", _number(found.marginal)))
        if some:
            rows.append(("ELBO of the same cells", _number(found.marginal_elbo)))
    rows.append(("Zeros among the counts", f"{found.zero_share:.1%}"))
    return _facts(rows, "Likelihood in numbers")


# --- mixing and labels --------------------------------------------------------------------------


def _latents(found: Latents | None) -> str:
    if found is None or all(score.entropy is None and score.ari is None for score in found.scores):
        return ""
    columns: list[tuple[str, str, float, bool]] = []
    if found.scores[0].entropy is not None:
        columns.append(
            (f"Mixing <small>of {found.ceiling:.2f} nats</small>", "entropy", found.ceiling or 1.0, True)
        )
        columns.append(("Batch silhouette <small>ideal 0</small>", "batch_silhouette", 1.0, False))
    if found.scores[0].ari is not None:
        columns += [
            ("ARI <small>of 1</small>", "ari", 1.0, True),
            ("NMI <small>of 1</small>", "nmi", 1.0, True),
            ("Label silhouette <small>ideal 1</small>", "label_silhouette", 1.0, True),
        ]
    rows = [_score_row(score, found.scores, columns) for score in found.scores]
    table = _table(["Latent", *(name for name, *_ in columns)], rows, "Scores of the latents", "scores")
    return section("Batches and labels", f"{table}<p class=note>{_latents_note(found)}</p>")


def _score_row(
    score: LatentScore, others: tuple[LatentScore, ...], columns: list[tuple[str, str, float, bool]]
) -> str:
    cells = []
    for _, name, full, more_is_better in columns:
        values = [round(getattr(other, name), 3) for other in others]
        value = round(getattr(score, name), 3)
        best = max(values) if more_is_better else min(values, key=abs)
        share = value / full if more_is_better else abs(value)
        kind = "" if more_is_better else "b"
        cells.append(bar_cell(f"{value:.3f}".replace("-", "−"), share, strong=value == best, kind=kind))
    return f'<tr><th scope="row">{escape(score.name)}</th>{"".join(cells)}</tr>'


def _latents_note(found: Latents) -> str:
    said = [f"On {found.n_cells:,} cells; PCA has as many dimensions, {found.n_dims}. The better is in bold."]
    if found.batch_key is not None and found.ceiling is not None:
        said.append(
            f"Mixing: entropy of the {found.n_batches} levels of {escape(found.batch_key)} among the "
            f"{found.n_neighbors} nearest neighbours; {found.ceiling:.2f} is reached where batches are mixed "
            "fully, which batches of different composition should not be."
        )
    if found.label_key is not None and found.n_labels > 1:
        unlabelled = found.n_cells - found.n_labelled
        left_out = f" {unlabelled:,} cells without a label are left out." if unlabelled else ""
        said.append(
            f"ARI and NMI: k-means with {found.n_labels} clusters against {escape(found.label_key)}."
            f"{left_out} Read both together: a latent that forgets everything mixes perfectly."
        )
    return " ".join(said)


# --- predictive checks --------------------------------------------------------------------------


def _predictive(card: Scorecard) -> str:
    found = card.predictive
    if found is None:
        return ""
    parts = []
    if card.pictures.check is not None:
        caption = (
            f"A point is a gene: of the counts, and the mean of {found.n_replicates} replicates drawn from "
            f"the model. Orange are genes beyond every replicate, {found.by_chance:.0%} of all by chance."
        )
        panels = plots.predictive_panels(card.pictures.check, size=340, max_genes=_GENES)
        parts.append(figure(_panels(panels), caption))
    parts.append(_checks(found))
    parts.append(f'<div class="unfold">{_farthest(found)}{_by_batch(card)}</div>')
    return section("Counts drawn from the model", "".join(parts))


def _panels(panels: list[tuple[str, str, str]]) -> str:
    shown = (
        f"<div><h3>{escape(name.capitalize())} <small>{escape(said)}</small></h3>{svg}</div>"
        for name, said, svg in panels
    )
    return f'<div class="three">{"".join(shown)}</div>'


def _checks(found: Predictive) -> str:
    head = [
        "Cells", "Zeros <small>observed</small>", "Zeros <small>drawn</small>",
        "Zeros <small>gap by gene</small>", "Mean <small>drawn / observed</small>",
        "Variance <small>drawn / observed</small>",
    ]  # fmt: skip
    rows = [_check_row(check) for check in (found.all_cells, *found.batches)]
    table = _table(head, rows, "Predictive checks of all cells and of each batch", "checks")
    note = (
        f"Ratios are medians over the genes that one cell in twenty has ({found.all_cells.n_detected:,} in "
        "all cells), ideal 1; the gap is the mean over the genes of the difference of their shares of zeros."
    )
    return f"{table}<p class=note>{note}</p>"


def _farthest(found: Predictive) -> str:
    if not found.farthest:
        return ""
    rows = []
    for gap in found.farthest:
        shown = [
            f"{value:.1%}" if gap.statistic == "zero_share" else f"{value:,.3g}"
            for value in (gap.observed, gap.replicated)
        ]
        name = _STATISTICS[gap.statistic]
        rows.append(
            f'<tr><th scope="row">{escape(gap.gene)}</th><td>{name}</td><td>{shown[0]}</td>'
            f"<td>{shown[1]}</td></tr>"
        )
    head = ["Gene", "Statistic", "Observed", "Drawn"]
    return _unfold("Genes farthest off", _table(head, rows, "Genes farthest off", "farthest"))


def _unfold(name: str, body: str) -> str:
    return f"<details><summary>{escape(name)}</summary>{body}</details>"


def _check_row(check: Check) -> str:
    name = "All" if check.group is None else escape(check.group)
    ratios = ["–" if ratio is None else f"{ratio:.2f}" for ratio in (check.mean_ratio, check.variance_ratio)]
    return (
        f'<tr><th scope="row">{name} <small>{check.n_cells:,}</small></th>'
        f"{bar_cell(f'{check.zeros:.1%}', check.zeros)}"
        f"{bar_cell(f'{check.zeros_replicated:.1%}', check.zeros_replicated)}"
        f"<td>{check.zeros_gap:.1%}</td><td>{ratios[0]}</td><td>{ratios[1]}</td></tr>"
    )


def _by_batch(card: Scorecard) -> str:
    if card.pictures.by_batch is None:
        return ""
    parts = []
    groups = list(card.pictures.by_batch.groupby("group", sort=False))
    for level, rows in groups[:_BATCHES]:
        panels = _panels(plots.predictive_panels(rows, size=340, max_genes=_GENES_EACH))
        parts.append(_unfold(f"Genes in {level}", f"<figure>{panels}</figure>"))
    left = len(groups) - _BATCHES
    more = f"<p class=note>{left} more batches stand in the table only.</p>" if left > 0 else ""
    return "".join(parts) + more


# --- calibration --------------------------------------------------------------------------------


def _calibration(card: Scorecard) -> str:
    found = card.calibration
    if found is None:
        return ""
    whose = f"of {escape(found.group)}" if found.group is not None else "of the atlas, of any kind"
    titles = [
        f"split {i + 1}: largest |K| {split.largest:.2f} ({split.gene}), {split.n_called} genes called"
        for i, split in enumerate(found.splits)
    ]
    chart = plots.threshold_strip(
        [split.largest for split in found.splits], found.threshold, titles=titles,
        x_label="largest |K| of all genes, nats", threshold_label=f"called beyond {found.threshold:g}",
        alt=f"Largest Bayes factor in each of {len(found.splits)} random splits",
    )  # fmt: skip
    caption = (
        f"{found.n_each} random cells {whose} against {found.n_each} others of the {found.n_group:,}: there "
        "is nothing to find, and hardly a gene should be called. A point is a split. What is missed "
        "elsewhere, this does not say."
    )
    worst = max(split.share_called for split in found.splits)
    rows = [
        ("Splits", f"{len(found.splits)}"),
        ("Genes called, mean", f"<b>{found.share_called:.2%}</b>"),
        ("Genes called, worst split", f"{worst:.2%}"),
        ("Largest |K|", f"{found.largest:.2f}"),
    ]
    body = f'<div class="wide-left">{figure(chart, caption)}{_facts(rows, "Calibration in numbers")}</div>'
    return section("Differential expression where there is none", body)


# --- the rest -----------------------------------------------------------------------------------


def _not_applicable(card: Scorecard) -> str:
    if not card.not_applicable:
        return ""
    rows = [
        (escape(one.part[0].upper() + one.part[1:]), f"{escape(one.reason)}.") for one in card.not_applicable
    ]
    items = "".join(
        f'<tr><th scope="row">{name}</th><td class="text">{value}</td></tr>' for name, value in rows
    )
    caption = '<caption class="hidden">What is not applicable</caption>'
    return section("Not applicable", f'<table class="reasons">{caption}<tbody>{items}</tbody></table>')


def _provenance(card: Scorecard) -> str:
    made = card.provenance
    hashes = [("Counts, SHA-256", made.counts_sha256), ("Weights, SHA-256", made.weights_sha256)]
    given = [(name, str(value)) for name, value in made.options.items() if value is not None]
    facts = [
        ("seed of training", "not known" if made.order_seed is None else str(made.order_seed)),
        ("order of the store", "random" if made.is_shuffled else "as given"),
        *given,
    ]
    config = [(name, str(value)) for name, value in card.config.items()]
    lines = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in hashes)
    return section(
        "From what this was made",
        f'<dl class="hashes">{lines}</dl><h3>Order and options</h3>{_list(facts)}<h3>The model</h3>'
        f"{_list(config)}<h3>Versions</h3>{_list(list(made.versions.items()))}",
    )


def _list(facts: list[tuple[str, str]]) -> str:
    items = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in facts)
    return f'<dl class="versions">{items}</dl>'


_STYLE = """
.halves{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,380px),1fr));gap:32px 44px;
align-items:start}
.halves .note:first-child{margin-top:8px}.note strong{color:var(--ink);font-weight:640}
.three{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,290px),1fr));gap:28px 24px}
.three svg{display:block;width:100%;height:auto;overflow:visible}
.three h3 small{display:block;font-size:.92rem;color:var(--ink-2);font-weight:400}
h1{overflow-wrap:anywhere}
.checks{margin-top:36px}.checks td{white-space:nowrap}
.checks small,.scores small{font-weight:400;color:var(--ink-2)}
.unfold{margin-top:20px}
details{border-bottom:1px solid var(--grid)}details[open]{padding-bottom:24px}.farthest td{white-space:nowrap}
summary{padding:11px 0;cursor:pointer;font-weight:600}
.hashes dt{color:var(--ink-2);font-size:.88rem}
.hashes dd{margin:0 0 14px;font:.88rem/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;
overflow-wrap:anywhere}
.versions+h3{margin-top:24px}.hashes+h3{margin-top:10px}
"""
