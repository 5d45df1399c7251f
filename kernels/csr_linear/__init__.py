"""The encoder's first layer on sparse counts."""

from .op import csr_linear

__all__ = ["csr_linear"]
