"""Every error that atlasvi raises on purpose, so that a caller can catch them by kind.

::

    AtlasviError
    ├── DataError            what was given is not what it should be
    │   ├── CountsError      an entry of the matrix is not a count
    │   ├── GenesError       genes are missing, duplicated or do not match
    │   ├── CellsError       cells are missing, duplicated, empty or do not match
    │   └── ObsError         a column of obs is missing, has gaps, or has a level never seen in training
    ├── StoreError           a file or folder cannot be read or written
    │   ├── NotAnAtlasError  the folder is not an atlas, or an ingest never finished
    │   ├── CorruptError     a checksum failed or a file is truncated
    │   └── SpaceError       the disk is full
    ├── ModelError           a model folder cannot be used
    │   ├── VersionError     it was written by a newer atlasvi
    │   └── NotTrainedError  the model must be trained first
    ├── OptionError          an argument that is wrong, or that we do not support
    └── TrainingError        training could not go on (a loss that is not finite)

Each also inherits the builtin a caller would expect (``ValueError``, ``KeyError``, ``OSError``,
``RuntimeError``). A message names the value, the place and the remedy, on one line.
"""

from __future__ import annotations


class AtlasviError(Exception):
    """Base of all errors raised on purpose by atlasvi.

    Example:
        >>> issubclass(CountsError, AtlasviError)
        True
    """


class DataError(AtlasviError, ValueError):
    """What was given is not what it should be."""


class CountsError(DataError):
    """An entry of the matrix is not a count: negative, fractional, NaN, infinite or too large."""


class GenesError(DataError):
    """Genes are missing, duplicated or do not match the model's."""


class CellsError(DataError):
    """Cells are missing, duplicated, empty or do not match."""


class ObsError(DataError):
    """A column of obs is missing, has gaps, or has a level that training never saw."""


class StoreError(AtlasviError, OSError):
    """A file or folder cannot be read or written."""


class NotAnAtlasError(StoreError):
    """The folder is not an atlas, or the ingest that was to make it never finished."""


class CorruptError(StoreError):
    """A checksum failed or a file is truncated."""


class SpaceError(StoreError):
    """There is no space left on the disk."""


class ModelError(AtlasviError, RuntimeError):
    """A model folder cannot be used."""


class VersionError(ModelError):
    """The model folder was written by a newer atlasvi."""


class NotTrainedError(ModelError):
    """The model must be trained first."""


class OptionError(AtlasviError, ValueError):
    """An argument is wrong, or is one that atlasvi does not support."""


class TrainingError(AtlasviError, RuntimeError):
    """Training could not go on, for example because the loss became NaN."""
