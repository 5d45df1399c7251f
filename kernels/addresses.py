"""Memory and C functions known by their addresses, in compiled loops."""

from __future__ import annotations

import ctypes
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

_BYTES = ir.IntType(8).as_pointer()


def _intrinsic(function: Any) -> Any:
    return intrinsic(function)


@_intrinsic
def pointer(_context, address):  # type: ignore[no-untyped-def]
    """An address as a pointer."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.inttoptr(args[0], _BYTES)

    return types.voidptr(types.uint64), codegen


@_intrinsic
def copy_bytes(_context, target, source, n):  # type: ignore[no-untyped-def]
    """What the C library does best: ``n`` bytes from one address to another."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        to, of = (builder.inttoptr(address, _BYTES) for address in args[:2])
        cgutils.raw_memcpy(builder, to, of, args[2], 1)
        return context.get_dummy_value()

    return types.void(types.uint64, types.uint64, types.int64), codegen


@_intrinsic
def call(_context, function, *arguments):  # type: ignore[no-untyped-def]
    """The C function at an address, of integers and addresses; its result as 64 bits.

    Of one that returns an ``int`` only the lower half means anything: ``np.int32(call(...))``.
    """
    word, n = ir.IntType(64), len(arguments)

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        target = ir.FunctionType(word, [word] * n).as_pointer()
        return builder.call(builder.inttoptr(args[0], target), cgutils.unpack_tuple(builder, args[1], n))

    return types.int64(types.uint64, types.UniTuple(types.int64, n)), codegen


def address_of(library: str | None, name: str) -> int:
    """Where a function of a shared library is (``None``: of what this process has), or 0 if it has none."""
    try:
        function = getattr(ctypes.CDLL(library), name)
    except (OSError, AttributeError):
        return 0
    return int(ctypes.cast(function, ctypes.c_void_p).value or 0)


__all__ = ["address_of", "call", "copy_bytes", "pointer"]
