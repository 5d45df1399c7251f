"""The training loop, its schedule, and its checkpoints."""

from atlasvi.train.board import TensorBoard

__all__ = ["TensorBoard"]
