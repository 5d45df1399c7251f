"""Two groups of cells and what is known of the genes between them: for `benchmarks.paper.differential`.

Needs numpy, pandas, scipy and anndata only, so that every method is asked about the same cells.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from benchmarks.paper.data import SETS

N_CELLS = 100
N_REPEATS = 5


@dataclass(frozen=True)
class Comparison:
    """Cells of some types against cells of others, or of one type against itself.

    Args:
        name: of the comparison.
        one: values of ``key``, of group one.
        two: of group two; those of ``one`` again where nothing differs.
        key: column of obs.
        within: another column and the values that cells of both groups have there.
        n_cells: a side and repeat.
    """

    name: str
    one: tuple[str, ...]
    two: tuple[str, ...]
    key: str = "label"
    within: tuple[str, tuple[str, ...]] | None = None
    n_cells: int = N_CELLS

    @property
    def null(self) -> bool:
        """Whether both groups are the same."""
        return self.one == self.two

    def drawn(self, obs: pd.DataFrame, seed: int, repeat: int) -> tuple[np.ndarray, np.ndarray]:
        """Sorted positions of each group's cells, without replacement; no cell is on both sides."""
        rng = np.random.default_rng([seed, repeat])
        one, two = (rng.permutation(self._cells(obs, values)) for values in (self.one, self.two))
        if self.null:
            two = one[self.n_cells :]
        for cells in (one, two):
            if len(cells) < self.n_cells:
                raise ValueError(f"{self.name}: {len(cells)} cells, {self.n_cells} are needed")
        return np.sort(one[: self.n_cells]), np.sort(two[: self.n_cells])

    def _cells(self, obs: pd.DataFrame, values: tuple[str, ...]) -> np.ndarray:
        keep = obs[self.key].astype(str).isin(values)
        if self.within is not None:
            keep &= obs[self.within[0]].astype(str).isin(self.within[1])
        return np.flatnonzero(keep.to_numpy())


_CD4 = ("memoryt", "regulatoryt", "thelper", "naivet")
_CD8 = ("cytotoxict", "naivecytotoxic")
COMPARISONS: Mapping[str, tuple[Comparison, ...]] = {
    "scmixology_celllines": (
        Comparison("H2228 - HCC827", ("H2228",), ("HCC827",)),
        Comparison("H1975 - HCC827", ("H1975",), ("HCC827",)),
        Comparison("A549 - H838", ("A549",), ("H838",)),
    ),
    "pbmc_sorted_reference": (
        Comparison("CD4 - CD8", _CD4, _CD8),
        Comparison("NK - NK", ("nk",), ("nk",)),
    ),
    "kang_treatment": (
        Comparison("monocytes, stim - ctrl", ("stim",), ("ctrl",), "group", ("label", ("CD14 Mono",))),
        Comparison(
            "CD4 T, stim - ctrl", ("stim",), ("ctrl",), "group", ("label", ("CD4 Naive T", "CD4 Memory T"))
        ),
    ),
    "ziegenhain_mesc_scrbseq_umi": (Comparison("mESC - mESC", ("mESC",), ("mESC",), n_cells=20),),
    "demo": (Comparison("C1 - A1", ("C1",), ("A1",)), Comparison("A1 - A2", ("A1",), ("A2",))),
    "little": (
        Comparison("B1 - B2", ("B1",), ("B2",)),
        Comparison("B1 - B1", ("B1",), ("B1",)),
    ),
}
# MSigDB's hallmark "interferon alpha response" (Liberzon et al. 2015): 97 genes, and older symbols of four.
INTERFERON = """
ADAR B2M BATF2 BST2 C1S CASP1 CASP8 CCRL2 CD47 CD74 CMPK2 CMTR1 CNP CSF1 CXCL10 CXCL11 DDX60 DHX58 EIF2AK2
ELF1 EPSTI1 FAM125A FAM46A FTSJD2 GBP2 GBP4 GMPR HELZ2 HERC6 HLA-C IFI27 IFI30 IFI35 IFI44 IFI44L IFIH1
IFIT2 IFIT3 IFITM1 IFITM2 IFITM3 IL15 IL4R IL7 IRF1 IRF2 IRF7 IRF9 ISG15 ISG20 LAMP3 LAP3 LGALS3BP LPAR6
LY6E MOV10 MVB12A MX1 NCOA7 NMI NUB1 OAS1 OASL OGFR PARP12 PARP14 PARP9 PLSCR1 PNPT1 PROCR PSMA3 PSMB8 PSMB9
PSME1 PSME2 RIPK2 RNF31 RSAD2 RTP4 SAMD9 SAMD9L SELL SLC25A28 SP110 STAT2 TAP1 TDRD7 TENT5A TMEM140 TRAFD1
TRIM14 TRIM21 TRIM25 TRIM26 TRIM5 TXNIP UBA7 UBE2L6 USP18 WARS WARS1
""".split()


@dataclass(frozen=True)
class Reference:
    """What is known of genes apart from these cells.

    Args:
        positive: (G,) which differ.
        known: (G,) which the reference speaks of.
        evidence: (G,) larger where it is surer, for ranks; ``None`` where it is a list of genes.
        change: (G,) signed, for example a log2 fold change, or ``None``.
    """

    positive: np.ndarray
    known: np.ndarray
    evidence: np.ndarray | None = None
    change: np.ndarray | None = None


def references(
    data: str, comparison: Comparison, genes: pd.Index, bulk: Mapping[str, np.ndarray] | None
) -> dict[str, Reference]:
    """By name. ``bulk`` is DESeq2 of the bulk counts, made by `benchmarks.paper.sides.deseq`, or ``None``."""
    if comparison.null:
        return {}
    folder = SETS["scmixology_celllines"].path().parent
    if data == "kang_treatment":
        known = np.ones(len(genes), bool)
        return {"interferon hallmark": Reference(np.asarray(genes.isin(INTERFERON)), known)}
    if data == "pbmc_sorted_reference":
        table = pd.read_csv(folder / "pbmc_bulk_DE_gene_info.csv.gz").set_index("GS")
        # Its fold changes are of CD8 over CD4: CD8A has 4.4, CD40LG -1.5.
        table["change"] = -table["CD_logFC"]
        return {"microarray": _of_table(table, genes, "CD_adj.P.Val", "CD_P.Value", "change")}
    if SETS[data].simulation is not None:
        change = true_change(data, comparison)
        return {"truth": Reference(np.abs(change) > 0.5, np.ones(len(genes), bool), np.abs(change), change)}
    found = {}
    if bulk is not None:
        table = pd.DataFrame(
            {what: bulk[f"{comparison.name}|{what}"] for what in ("p", "adjusted", "change")},
            index=bulk["genes"],
        )
        found["bulk, DESeq2"] = _of_table(table, genes, "adjusted", "p", "change")
    # Slopes on the share of a line's RNA in place of HCC827's: they follow the bulk's fold changes of that
    # pair (r = 0.90 and 0.87 over genes below 5 %) and of no other as well.
    first, second = comparison.one[0], comparison.two[0]
    if second == "HCC827":
        table = pd.read_csv(folder / f"scmixology_90cell_{first}_DEtable.csv.gz", index_col=0)
        found["90 cells, edgeR"] = _of_table(table, genes, "FDR", "PValue", "logFC")
    return found


def true_change(data: str, comparison: Comparison) -> np.ndarray:
    """(G,) log2 of the ratio of the types' mean true frequencies; needs atlasvi."""
    from atlasvi import Simulation

    arguments = SETS[data].simulation
    assert arguments is not None
    simulation = Simulation(**arguments)
    types = np.asarray(simulation.obs_column("cell_type"))
    one, two = (
        simulation.true_rho_of(np.flatnonzero(types == values[0])).mean(0)
        for values in (comparison.one, comparison.two)
    )
    change: np.ndarray = np.log2(one) - np.log2(two)
    return change


def _of_table(table: pd.DataFrame, genes: pd.Index, adjusted: str, p: str, change: str) -> Reference:
    table = table[~table.index.duplicated() & table.index.notna()].reindex(genes)
    known = table[p].notna().to_numpy()
    smallest = np.finfo(np.float64).tiny
    return Reference(
        (table[adjusted] < 0.05).to_numpy() & known,
        known,
        -np.log10(np.maximum(table[p].fillna(1).to_numpy(), smallest)),
        table[change].fillna(0).to_numpy(),
    )
