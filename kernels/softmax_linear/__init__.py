"""A softmax over genes of a linear layer: what a decoder ends with."""

from .op import SoftmaxLinear

__all__ = ["SoftmaxLinear"]
