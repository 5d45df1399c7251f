"""The numba backend: a tile of genes at a time, whose rows of weight stay in the second-level cache.

README.md beside this file says why it is laid out so, with measurements.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic
from numpy.typing import NDArray

from ..parallel import compiled, empty, in_parallel, n_threads

# Bytes of weight, or of its gradient, that a tile of genes may take. Backward reads and writes them.
_TILE_FORWARD, _TILE_BACKWARD = 1 << 19, 1 << 18
_FEW = 1 << 20  # multiplications that take less time than starting a thread
_OUTSIDE, _DISORDER, _OFFSETS = 1, 2, 4


def forward(
    indptr: torch.Tensor, indices: torch.Tensor, values: torch.Tensor, weight: torch.Tensor
) -> torch.Tensor:
    """``out[b] = sum_k values[k] * weight[indices[k]]`` over the entries k of row b; float32."""
    n_vars, n_hidden = weight.shape
    entries = _by_tile(indptr, indices, values, n_vars, _log2_tile(_TILE_FORWARD, n_hidden))
    out = torch.empty(len(indptr) - 1, n_hidden)
    parts = _threads(len(out), len(values) * n_hidden)
    in_parallel(_forward, len(out), *entries, weight.contiguous().numpy(), out.numpy(), parts=parts)
    return out


def backward(
    indptr: torch.Tensor, indices: torch.Tensor, values: torch.Tensor, upstream: torch.Tensor, n_vars: int
) -> torch.Tensor:
    """``g_weight[indices[k]] = sum_k values[k] * upstream[b]`` over the entries k; float32."""
    n_hidden = upstream.shape[1]
    log2_tile = _log2_tile(_TILE_BACKWARD, n_hidden)
    entries = _by_tile(indptr, indices, values, n_vars, log2_tile)
    g_weight = empty((n_vars, n_hidden))
    n_tiles = _n_tiles(n_vars, log2_tile)
    # Tiles in turn, not in ranges: genes may be sorted by how often they are seen.
    parts = _threads(n_tiles, len(values) * n_hidden)
    arrays = (upstream.contiguous().numpy(), g_weight.numpy(), log2_tile, parts)
    in_parallel(_backward, n_tiles, *entries, *arrays, parts=parts)
    return g_weight


def _threads(most: int, multiplications: int) -> int:
    return n_threads(most) if multiplications > _FEW else 1


def _log2_tile(n_bytes: int, n_hidden: int) -> int:
    return max(4, (n_bytes // max(4 * n_hidden, 1)).bit_length() - 1)


def _n_tiles(n_vars: int, log2_tile: int) -> int:
    return (n_vars + (1 << log2_tile) - 1) >> log2_tile


def _by_tile(
    indptr: torch.Tensor, indices: torch.Tensor, values: torch.Tensor, n_vars: int, log2_tile: int
) -> tuple[NDArray[Any], ...]:
    """``(indptr, indices, values, ends)``, the entries of each row with those of one tile side by side.

    ``ends[b, t]`` is how many entries of row b lie in the tiles up to t.
    """
    offsets, n_obs = indptr.contiguous().numpy(), len(indptr) - 1
    columns, numbers = indices.to(torch.int32).contiguous().numpy(), values.contiguous().numpy()
    ends = np.empty((n_obs, _n_tiles(n_vars, log2_tile)), np.int32)
    parts = _threads(n_obs, len(columns))
    problems = np.zeros(parts, np.int64)
    in_parallel(_find_tiles, n_obs, offsets, columns, n_vars, log2_tile, ends, problems, parts=parts)
    found = np.bitwise_or.reduce(problems)
    if found & ~_DISORDER:
        _raise(offsets, columns, n_vars)
    if found:
        unordered = columns, numbers
        columns, numbers = np.empty_like(columns), np.empty_like(numbers)
        in_parallel(_group, n_obs, offsets, *unordered, log2_tile, ends, columns, numbers, parts=parts)
    return offsets, columns, numbers, ends


def _raise(indptr: NDArray[Any], indices: NDArray[Any], n_vars: int) -> None:
    if indptr[0] != 0 or indptr[-1] != len(indices) or (np.diff(indptr) < 0).any():
        raise ValueError(f"counts.indptr must rise from 0 to {len(indices)}, the number of entries")
    k = int(np.flatnonzero((indices < 0) | (indices >= n_vars))[0])
    row = int(np.searchsorted(indptr, k, side="right")) - 1
    raise ValueError(f"counts.indices has {indices[k]} in row {row}; columns must lie in [0, {n_vars})")


def _compiled_loop(blocks: list[tuple[int, int]], *, scatter: bool) -> Any:
    """``one[b] += sum_k values[k] * many[indices[k]]``; or ``many[indices[k]] += values[k] * one[b]``.

    numba keeps an array in memory, and the sums must be in registers: so these loops are written as LLVM
    instructions. A pass over the entries takes so many hidden units as one block has, (vectors, lanes of
    each); LLVM splits vectors that are wider than the machine's, and uses those of AVX-512 whole.
    """
    int32, int64 = ir.IntType(32), ir.IntType(64)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        def array(i: int) -> Any:
            return context.make_array(signature.args[i])(context, builder, arguments[i])

        def load(where: Any) -> Any:
            loaded = builder.load(where)
            loaded.align = 4
            return loaded

        def store(value: Any, where: Any) -> None:
            builder.store(value, where).align = 4

        def entries(h: Any, n_vectors: int, lanes: int) -> None:
            vector = ir.VectorType(ir.FloatType(), lanes)
            muladd = cgutils.get_or_insert_function(
                builder.module, ir.FunctionType(vector, [vector] * 3), f"llvm.fmuladd.v{lanes}f32"
            )

            def row(data: Any, index: Any) -> list[Any]:
                first = builder.gep(data, [builder.add(builder.mul(index, n_hidden), h)])
                first = builder.bitcast(first, vector.as_pointer())
                return [builder.gep(first, [int64(i)]) for i in range(n_vectors)]

            # LLVM turns these into registers.
            held = [cgutils.alloca_once(builder, vector) for _ in range(n_vectors)]
            for where, one in zip(row(array(0).data, b), held, strict=True):
                builder.store(load(where), one)
            with cgutils.for_range_slice(builder, start, stop, int64(1)) as (k, _):
                value = load(builder.gep(array(2).data, [k]))
                value = builder.insert_element(ir.Constant(vector, ir.Undefined), value, int32(0))
                everywhere = ir.Constant(ir.VectorType(int32, lanes), [0] * lanes)
                value = builder.shuffle_vector(value, value, everywhere)
                index = builder.zext(load(builder.gep(array(3).data, [k])), int64)
                for where, one in zip(row(array(6).data, index), held, strict=True):
                    if scatter:
                        store(builder.call(muladd, [value, builder.load(one), load(where)]), where)
                    else:
                        builder.store(builder.call(muladd, [value, load(where), builder.load(one)]), one)
            if not scatter:
                for where, one in zip(row(array(0).data, b), held, strict=True):
                    store(builder.load(one), where)

        _, b, _, _, start, stop, _ = arguments
        _, n_hidden = cgutils.unpack_tuple(builder, array(6).shape)
        h = int64(0)
        for n_vectors, lanes in blocks:
            width = int64(n_vectors * lanes)
            last = builder.sub(n_hidden, builder.urem(builder.sub(n_hidden, h), width))
            with cgutils.for_range_slice(builder, h, last, width) as (at, _):
                entries(at, n_vectors, lanes)
            h = last
        return context.get_dummy_value()

    @intrinsic
    def loop(  # type: ignore[no-untyped-def]
        typing_context, one, b, values, indices, start, stop, many
    ):
        n = types.int64
        return types.void(one, n, values, indices, n, n, many), generate

    return loop


# Sums of a wider block would not fit in the registers of AVX2 or NEON. What scattering only reads may not.
_gather = _compiled_loop([(4, 16), (1, 16), (1, 4), (1, 1)], scatter=False)
_scatter = _compiled_loop([(8, 16), (4, 16), (1, 16), (1, 4), (1, 1)], scatter=True)


@compiled()
def _find_tiles(part, first, last, indptr, indices, n_vars, log2_tile, ends, problems):  # type: ignore[no-untyped-def]
    shift, n_vars = np.uint64(log2_tile), np.uint32(n_vars)
    for b in range(first, last):
        start, stop = indptr[b], indptr[b + 1]
        if not 0 <= start <= stop <= len(indices):
            problems[part] |= _OFFSETS
            return
        row, end = indices[start:stop], ends[b]
        outside, disorder, after = np.uint8(0), np.uint8(0), row[1:]
        for k in range(len(row)):
            outside |= np.uint8(np.uint32(row[k]) >= n_vars)
        for k in range(len(after)):
            disorder |= np.uint8(after[k] < row[k])
        if outside:
            problems[part] |= _OUTSIDE
            return
        if disorder:
            problems[part] |= _DISORDER
        end[:] = 0
        for k in range(len(row)):
            # No branch: of the entries of a tile the last one writes last.
            end[np.uint64(row[k]) >> shift] = k + 1
        for t in range(1, len(end)):
            end[t] = max(end[t], end[t - 1])


@compiled()
def _group(  # type: ignore[no-untyped-def]
    part, first, last, indptr, indices, values, log2_tile, ends, out_indices, out_values
):
    """Bring the entries of a row into the order of tiles; within a tile they keep theirs."""
    shift = np.uint64(log2_tile)
    for b in range(first, last):
        end = ends[b]
        end[:] = 0
        for k in range(indptr[b], indptr[b + 1]):
            end[np.uint64(indices[k]) >> shift] += 1
        total = 0
        for t in range(len(end)):
            n, end[t] = end[t], total
            total += n
        for k in range(indptr[b], indptr[b + 1]):
            tile = np.uint64(indices[k]) >> shift
            at = indptr[b] + end[tile]
            out_indices[at], out_values[at] = indices[k], values[k]
            end[tile] += 1


@compiled()
def _forward(part, first, last, indptr, indices, values, ends, weight, out):  # type: ignore[no-untyped-def]
    out[first:last] = 0
    for t in range(ends.shape[1]):
        for b in range(first, last):
            start = indptr[b] + (ends[b, t - 1] if t > 0 else 0)
            _gather(out, b, values, indices, start, indptr[b] + ends[b, t], weight)


@compiled()
def _backward(  # type: ignore[no-untyped-def]
    part, first, last, indptr, indices, values, ends, upstream, g_weight, log2_tile, parts
):
    for t in range(part, ends.shape[1], parts):
        g_weight[t << log2_tile : (t + 1) << log2_tile] = 0
        for b in range(len(indptr) - 1):
            start = indptr[b] + (ends[b, t - 1] if t > 0 else 0)
            _scatter(upstream, b, values, indices, start, indptr[b] + ends[b, t], g_weight)
