"""What a hidden layer does after its product: batch norm, ReLU and dropout in one pass."""

from .op import norm_relu_dropout

__all__ = ["norm_relu_dropout"]
