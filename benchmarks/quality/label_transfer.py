"""Labels of a reference for the cells of a query: SCANVI and ACTINN, beside scvi-tools and a regression.

    export ATLASVI_TEST_DATA=data
    python -m benchmarks.quality.label_transfer --seeds 3 --method SCANVI "SCANVI after SCVI"
    python -m benchmarks.quality.label_transfer --seeds 3 --method ACTINN regression
    .peers/scvi-tools/bin/python -m benchmarks.quality.label_transfer --seeds 3 --method scvi-tools \
        "scvi-tools after SCVI"
    python -m benchmarks.quality.label_transfer --table

Each run is appended to ``label_transfer.json`` beside this file as it ends; what is there is not run again.

Two kinds of task. In scmixology_celllines, whose labels are genotypes, each plate is hidden in turn and the
others are the reference. pbmc_sorted_reference, whose labels are by sorting, gives labels to two sets that
have none; these are judged by markers, `by_markers`: only cells whose markers speak for one of four coarse
types and for none of the others, and only whether the coarse type is right. All methods see the same genes,
the 2,000 of the shared ones that vary most in the reference. SCANVI, ours and theirs, has the query in its
training without its labels, ACTINN has not, and the regression (scikit-learn's, logistic) is on 50
principal components of reference and query together. SCANVI is trained for at most 80 epochs, or for at most
20 after a SCVI of at most 60, as scvi-tools advises, by the schedule that each library has by default.

In some tasks no cell of one type has a label anywhere, and in some the reference has no such cell at all: it
is asked how right the others are, whether a method is less certain of that one, and, of ours, whether that
one lies farther from all labels (`SCANVI.label_distances`).
"""

from __future__ import annotations

import argparse
import json
import os
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import scipy.sparse as sp
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, f1_score, roc_auc_score

HERE = Path(__file__).parent
RESULTS = HERE / "label_transfer.json"
N_GENES = 2_000
EPOCHS_SCVI, EPOCHS_SCANVI = 60, 20
UNKNOWN = "Unknown"
# Cell lines of all plates that are left without a label in turn, and what counts as certain then.
UNLABELLED = ("H1975", "H2228", "HCC827")
# A type without a label, of which the reference has cells, or has none.
WITHOUT, ALONE = " without", ", in the query alone:"
KINDS = (WITHOUT, ALONE)
CERTAIN = 0.9
CERTAINTY = ("certain_known", "certain_unlabelled", "auroc")
DISTANCE = ("within_known", "within_unlabelled", "auroc_distance")
# Coarse type -> markers, and how many of them a cell must have.
MARKERS = {
    "T": (("CD3D", "CD3E", "CD3G"), 2),
    "B": (("CD79A", "CD79B", "MS4A1"), 2),
    "monocyte": (("LYZ", "S100A8", "S100A9", "FCN1"), 3),
    "NK": (("GNLY", "NKG7", "KLRF1", "KLRD1"), 3),
}
COARSE = {"bcells": "B", "monocytes": "monocyte", "nk": "NK"}  # and every other label of the reference is T


@dataclass(frozen=True)
class Task:
    """Cells of a reference and of a query, with the same genes.

    Args:
        name: of the data and, where one is hidden, the plate.
        cells: counts; obs has ``batch`` and ``label``, which is `UNKNOWN` for the query.
        is_query: which cells they are.
        score: of labels for the query's cells, of the probability of each, and of its distance from the
            nearest label where there is one.
    """

    name: str
    cells: anndata.AnnData
    is_query: np.ndarray
    score: Callable[[np.ndarray, np.ndarray, np.ndarray | None], dict[str, float]]


def read(name: str) -> anndata.AnnData:
    """A data set of ``ATLASVI_TEST_DATA``, by default ``shared/data`` beside the repository."""
    default = Path(__file__).resolve().parents[3] / "shared" / "data"
    found = anndata.read_h5ad(Path(os.environ.get("ATLASVI_TEST_DATA", default)) / f"{name}.h5ad")
    found.X = sp.csr_matrix(found.X, dtype=np.float32)
    return found


def log_normalised(counts: sp.csr_matrix) -> sp.csr_matrix:
    """log(1 + 10,000 x / total)."""
    scaled = sp.diags(1e4 / np.maximum(counts.sum(1).A1, 1)) @ counts
    return scaled.log1p().tocsr()


def most_variable(cells: anndata.AnnData) -> np.ndarray:
    """Which genes vary most, on the logarithmic scale."""
    y = log_normalised(cells.X)
    variance = y.multiply(y).mean(0).A1 - y.mean(0).A1 ** 2
    return np.sort(np.argsort(-variance, kind="stable")[:N_GENES])


def by_markers(counts: anndata.AnnData) -> np.ndarray:
    """The coarse type that a cell's markers speak for, empty where they speak for none or for several.

    NK cells have none of the markers of T cells besides.
    """
    seen = {name: (counts[:, list(genes)].X > 0).sum(1).A1 for name, (genes, _) in MARKERS.items()}
    holds = {name: seen[name] >= least for name, (_, least) in MARKERS.items()}
    holds["NK"] &= seen["T"] == 0
    found = np.full(counts.n_obs, "", dtype=object)
    alone = sum(rule.astype(int) for rule in holds.values()) == 1
    for name, rule in holds.items():
        found[rule & alone] = name
    return found


def coarse(labels: np.ndarray) -> np.ndarray:
    """The coarse types of labels of pbmc_sorted_reference."""
    return np.array([COARSE.get(label, "T") for label in labels], dtype=object)


def tasks() -> Iterator[Task]:
    """All of them; the counts of one at a time are in memory."""
    whole = read("scmixology_celllines")
    whole = whole[whole.obs["demuxlet_cls"] == "SNG"].copy()
    truth = whole.obs["cell_type"].astype(str).to_numpy()
    hidden = [(plate, "", "") for plate in sorted(whole.obs["batch"].unique())]
    for plate, line, kind in [*hidden, *(("dropseq", line, kind) for kind in KINDS for line in UNLABELLED)]:
        is_query = (whole.obs["batch"] == plate).to_numpy()
        cells = whole[:, most_variable(whole[~is_query])].copy()
        has_label = ~is_query & (truth != line)
        cells.obs = cells.obs[["batch"]].assign(label=np.where(has_label, truth, UNKNOWN)).astype(str)
        there = is_query | has_label if kind == ALONE else np.ones(len(truth), bool)

        def score(
            labels: np.ndarray,
            certainty: np.ndarray,
            nearest: np.ndarray | None,
            expected: np.ndarray = truth[is_query],
            line: str = line,
        ) -> dict[str, float]:
            known = expected != line
            found = {
                "accuracy": accuracy_score(expected[known], labels[known]),
                "macro_f1": f1_score(
                    expected[known], labels[known], average="macro", labels=np.unique(expected[known])
                ),
            }
            return {**found, **of_certainty(certainty, nearest, known)}

        name = f"scmixology_celllines/{plate}{line and f'{kind} {line}'}"
        yield Task(name, cells[there].copy(), is_query[there], score)

    reference = read("pbmc_sorted_reference")
    of_reference = reference.obs["cell_type"].astype(str)
    pbmc = (
        ("pbmc_frozen_donorA", "", ""),
        ("pbmc_3chemistries", "", ""),
        *(("pbmc_frozen_donorA", "bcells", kind) for kind in KINDS),
    )
    for name, left_out, kind in pbmc:
        query = read(name)
        judged = by_markers(query)
        shared = [gene for gene in reference.var_names if gene in set(query.var_names)]
        batch = query.obs["batch"].astype(str) if "batch" in query.obs else np.full(query.n_obs, name)
        labels = of_reference.where(of_reference != left_out, UNKNOWN)
        parts = []
        for cells, obs in (
            (reference, {"batch": "reference", "label": labels}),
            (query, {"batch": batch, "label": UNKNOWN}),
        ):
            part = cells[:, shared].copy()
            part.obs = part.obs[[]].assign(**obs)
            parts.append(part)
        genes = most_variable(parts[0])
        both = anndata.concat([part[:, genes] for part in parts], index_unique="-", keys=["r", "q"])
        is_query = both.obs_names.str.endswith("-q")
        has_label = (both.obs["label"] != UNKNOWN).to_numpy()
        there = is_query | has_label if kind == ALONE else np.ones(both.n_obs, bool)

        def of_coarse(
            labels: np.ndarray,
            certainty: np.ndarray,
            nearest: np.ndarray | None,
            expected: np.ndarray = judged,
            left_out: str = left_out,
        ) -> dict[str, float]:
            is_clear = expected != ""
            labels, certainty, expected = coarse(labels[is_clear]), certainty[is_clear], expected[is_clear]
            nearest = None if nearest is None else nearest[is_clear]
            known = expected != COARSE.get(left_out)
            found = {
                f"right_{kind}": (labels == kind)[expected == kind].mean()
                for kind in MARKERS
                if kind in expected[known]
            }
            found = {"accuracy": (labels == expected)[known].mean(), "clear": is_clear.mean(), **found}
            return {**found, **of_certainty(certainty, nearest, known)}

        yield Task(
            f"{name}{left_out and f'{kind} {left_out}'}", both[there].copy(), is_query[there], of_coarse
        )


def of_certainty(certainty: np.ndarray, nearest: np.ndarray | None, known: np.ndarray) -> dict[str, float]:
    """Whether cells of a type that has no label are known by how unsure a method is, or by how far they lie.

    Where there are no such cells, the share that lies within 1 of a label.
    """
    if known.all():
        return {} if nearest is None else {DISTANCE[0]: (nearest <= 1).mean()}
    shares = ((certainty[of] > CERTAIN).mean() for of in (known, ~known))
    found = dict(zip(CERTAINTY, (*shares, roc_auc_score(known, certainty)), strict=True))
    if nearest is None:
        return found
    shares = ((nearest[of] <= 1).mean() for of in (known, ~known))
    return {**found, **dict(zip(DISTANCE, (*shares, roc_auc_score(~known, nearest)), strict=True))}


# --- methods: (task, seed) -> probabilities of the query's cells, a column a label; and of ours how far they
# --- lie from the nearest label --------------------------------------------------------------------


Answer = tuple[pd.DataFrame, np.ndarray | None]


def asked(model: Any, task: Task) -> Answer:
    """Of a trained SCANVI of ours."""
    cells = np.flatnonzero(task.is_query)
    soft = model.predict(indices=cells, soft=True)
    return soft, model.label_distances(indices=cells).to_numpy().min(1)


def scanvi(task: Task, seed: int) -> Answer:
    """Ours."""
    import atlasvi

    cells = task.cells.copy()
    atlasvi.SCANVI.setup_anndata(cells, "label", UNKNOWN, batch_key="batch", gene_mask=None)
    model = atlasvi.SCANVI(cells, seed=seed)
    model.train(EPOCHS_SCVI + EPOCHS_SCANVI, enable_progress_bar=False, seed=seed)
    return asked(model, task)


def scanvi_after_scvi(task: Task, seed: int, schedule: str | None = None) -> Answer:
    """Ours, from the weights of a SCVI."""
    import atlasvi

    cells = task.cells.copy()
    atlasvi.SCVI.setup_anndata(cells, batch_key="batch", gene_mask=None)
    scvi = atlasvi.SCVI(cells, seed=seed)
    scvi.train(EPOCHS_SCVI, enable_progress_bar=False, seed=seed)
    model = atlasvi.SCANVI.from_scvi_model(scvi, UNKNOWN, "label")
    model.train(EPOCHS_SCANVI, enable_progress_bar=False, seed=seed, schedule=schedule)
    return asked(model, task)


def actinn(task: Task, seed: int) -> Answer:
    """Ours; it sees the labelled cells of the reference alone."""
    import atlasvi

    reference = task.cells[~task.is_query & (task.cells.obs["label"] != UNKNOWN).to_numpy()].copy()
    query = task.cells[task.is_query].copy()
    atlasvi.ACTINN.setup_anndata(reference, labels_key="label", gene_mask=None)
    model = atlasvi.ACTINN(reference, query, seed=seed)
    model.train(enable_progress_bar=False, seed=seed)
    return model.predict(query, soft=True), None


def regression(task: Task, seed: int) -> Answer:
    """scikit-learn's, on principal components of all cells."""
    y = log_normalised(task.cells.X).toarray()
    z = PCA(50, random_state=seed).fit_transform(y)
    labels = task.cells.obs["label"].to_numpy()
    has_label = labels != UNKNOWN
    model = LogisticRegression(max_iter=2_000).fit(z[has_label], labels[has_label])
    return pd.DataFrame(model.predict_proba(z[task.is_query]), columns=model.classes_), None


def peer(task: Task, seed: int, *, after_scvi: bool = False) -> Answer:
    """scvi-tools' SCANVI."""
    import logging

    import scvi

    logging.getLogger("scvi").setLevel(logging.WARNING)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    scvi.settings.seed = seed
    cells = task.cells.copy()
    options = {"accelerator": "cpu", "devices": 1, "enable_progress_bar": False}
    if after_scvi:
        scvi.model.SCVI.setup_anndata(cells, batch_key="batch", labels_key="label")
        start = scvi.model.SCVI(cells)
        start.train(EPOCHS_SCVI, **options)
        model = scvi.model.SCANVI.from_scvi_model(start, UNKNOWN, adata=cells)
        model.train(EPOCHS_SCANVI, **options)
    else:
        scvi.model.SCANVI.setup_anndata(cells, "label", UNKNOWN, batch_key="batch")
        model = scvi.model.SCANVI(cells)
        model.train(EPOCHS_SCVI + EPOCHS_SCANVI, **options)
    return model.predict(indices=np.flatnonzero(task.is_query), soft=True), None


METHODS: dict[str, Callable[[Task, int], Answer]] = {
    "SCANVI": scanvi,
    "SCANVI after SCVI": scanvi_after_scvi,
    "SCANVI after SCVI, adaptive": partial(scanvi_after_scvi, schedule="adaptive"),
    "ACTINN": actinn,
    "regression": regression,
    "scvi-tools": peer,
    "scvi-tools after SCVI": partial(peer, after_scvi=True),
}
NAMES = {
    "regression": "regression on PCA",
    "scvi-tools": "scvi-tools' SCANVI",
    "scvi-tools after SCVI": "scvi-tools' after SCVI",
}


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--method", nargs="+", choices=list(METHODS), default=[])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    if options.method:
        # Before torch, as it sets how long torch's threads spin.
        if not all(method.startswith("scvi-tools") for method in options.method):
            import atlasvi  # noqa: F401
        import torch

        torch.set_num_threads(1)
        for task in tasks():
            for method in options.method:
                for seed in range(options.seeds):
                    run(task, method, seed)
    if options.table:
        print(tables(json.loads(RESULTS.read_text())))


def run(task: Task, method: str, seed: int) -> None:
    """One method on one task, if it is not in the results yet."""
    runs: list[dict[str, Any]] = json.loads(RESULTS.read_text()) if RESULTS.is_file() else []
    key = {"task": task.name, "method": method, "seed": seed}
    if any(key.items() <= known.items() for known in runs):
        return
    start = time.perf_counter()
    soft, nearest = METHODS[method](task, seed)
    score = task.score(soft.columns.to_numpy()[soft.to_numpy().argmax(1)], soft.to_numpy().max(1), nearest)
    seconds = round(time.perf_counter() - start, 1)
    found = {**key, **{name: round(float(value), 4) for name, value in score.items()}, "seconds": seconds}
    runs = json.loads(RESULTS.read_text()) if RESULTS.is_file() else []
    part = RESULTS.with_name(f".{RESULTS.name}.{method}")
    part.write_text("[\n " + ",\n ".join(json.dumps(each) for each in [*runs, found]) + "\n]\n")
    part.replace(RESULTS)
    print(json.dumps(found), flush=True)


def tables(runs: list[dict[str, Any]]) -> str:
    """Markdown: what is right (of so many seeds), by coarse type too, and where a type has no label."""
    from benchmarks.paper.tables import table

    methods = [method for method in METHODS if any(found["method"] == method for found in runs)]
    names = sorted({found["task"] for found in runs})

    def means(name: str, method: str, *columns: str) -> list[str]:
        rows = [found for found in runs if (found["task"], found["method"]) == (name, method)]
        of = [
            f"{np.mean([row[column] for row in rows]):.3f}" if all(column in row for row in rows) else ""
            for column in columns
            if rows
        ]
        return [f"{of[0]} ({len(rows)})", *of[1:]] if of and columns[0] == "accuracy" else of

    def shown(name: str) -> str:
        return name.replace("/", ", hidden: ")

    usual = [name for name in names if not any(kind in name for kind in KINDS)]
    right = [
        [shown(name), *("".join(means(name, method, "accuracy")) for method in methods)] for name in usual
    ]
    kinds = [f"right_{kind}" for kind in MARKERS]
    by_type, certain = [], []
    for name in names:
        for method in methods:
            of = [shown(name), NAMES.get(method, method)]
            if name in usual and (found := name.startswith("pbmc") and means(name, method, *kinds)):
                by_type.append([*of, *found])
            if name not in usual and (found := means(name, method, "accuracy", *CERTAINTY, *DISTANCE)):
                certain.append([*of, *found])
    heads = [
        "labelled, certain", "the other, certain", "AUROC",
        "labelled, near", "the other, near", "AUROC, distance",
    ]  # fmt: skip
    return "\n\n".join([
        table(["", *(NAMES.get(method, method) for method in methods)], right, 1),
        table(["", "", *MARKERS], by_type, 2),
        table(["", "", "right", *heads], certain, 2),
    ])  # fmt: skip


if __name__ == "__main__":
    main()
