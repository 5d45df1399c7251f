"""A scorecard of any model: likelihood, predictive checks, calibration, mixing, labels, and from what.

`evaluate` makes it in one pass over the counts, `Scorecard` holds it, `page` and `table` show it.
"""

from atlasvi.scorecard.card import Scorecard, check_place
from atlasvi.scorecard.making import QUICK, THOROUGH, Effort, evaluate
from atlasvi.scorecard.terminal import table

__all__ = ["QUICK", "THOROUGH", "Effort", "Scorecard", "check_place", "evaluate", "table"]
