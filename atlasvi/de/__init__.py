"""Differential expression: Bayes factors and effect sizes of groups of cells, in one pass over the counts."""

from atlasvi.de.ask import Question, decode_batches, differential_expression
from atlasvi.de.calibration import calibration
from atlasvi.de.groups import Groups, cells_of, groups_of

__all__ = [
    "Groups",
    "Question",
    "calibration",
    "cells_of",
    "decode_batches",
    "differential_expression",
    "groups_of",
]
