"""Count likelihoods, one file each. Add one: a file with a `Likelihood`, and its line in `by_name`."""

from __future__ import annotations

from atlasvi.errors import OptionError
from atlasvi.likelihoods.base import Likelihood
from atlasvi.likelihoods.nb import NB
from atlasvi.likelihoods.poisson import POISSON
from atlasvi.likelihoods.zinb import ZINB
from atlasvi.likelihoods.zip import ZIP

__all__ = ["NB", "POISSON", "ZINB", "ZIP", "Likelihood", "by_name"]


def by_name(name: str) -> Likelihood:
    """The likelihood that scvi-tools' ``gene_likelihood=`` calls ``name``.

    Raises:
        OptionError: there is none of that name.

    Example:
        >>> by_name("zinb").has_pi
        True
    """
    known = {one.name: one for one in (POISSON, ZIP, NB, ZINB)}
    if name not in known:
        raise OptionError(f"gene_likelihood {name!r} is not known; choose one of {', '.join(known)}")
    return known[name]
