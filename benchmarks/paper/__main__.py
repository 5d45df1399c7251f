"""The scVI paper's experiments, one command each: ``python -m benchmarks.paper NAME``.

Peers run in environments of their own, made by ``benchmarks/peers/*_env.sh``; one that is not given is not
run. What is there already is not made again, so a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
from importlib import import_module
from pathlib import Path

from benchmarks.paper import page
from benchmarks.paper.fits import Pythons
from benchmarks.paper.options import Options
from benchmarks.paper.record import RESULTS

EXPERIMENTS = ("heldout", "clustering", "batches", "cost", "differential", "imputation", "learnt")


def main() -> None:
    """Run the experiment that is named."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.paper",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", choices=EXPERIMENTS)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--data", nargs="+", default=[])
    parser.add_argument("--methods", nargs="+", default=[])
    parser.add_argument("--quick", action="store_true", help="atlasvi alone, on little data")
    parser.add_argument("--cached", action="store_true", help="make no fit: rows of those that are there")
    parser.add_argument("--variable", action="store_true", help="differential, imputation: few genes only")
    parser.add_argument("--page", action="store_true", help="run nothing; tables and pictures of docs/")
    parser.add_argument("--work", type=Path, default=Path(".paper"), help="folder of fits")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON files")
    parser.add_argument("--scvi-tools", help="Python of an environment with scvi-tools")
    parser.add_argument("--classic", help="Python of an environment with the other peers")
    parser.add_argument(
        "--limit", type=float, default=3_600.0, help="cost: seconds until a method is stopped"
    )
    parser.add_argument("--largest", type=int, default=1_000_000, help="cost: cells of 2,000 genes at most")
    given = parser.parse_args()
    options = Options(
        seeds=given.seeds,
        data=tuple(given.data),
        methods=tuple(given.methods),
        quick=given.quick,
        variable=given.variable,
        work=given.work,
        results=given.results,
        pythons=Pythons(given.scvi_tools, given.classic, here=given.quick, none=given.cached),
        limit=given.limit,
        largest=given.largest,
    )
    if given.page:
        page.write(given.name, options)
        return
    import_module(f"benchmarks.paper.{given.name}").run(options)


if __name__ == "__main__":
    main()
