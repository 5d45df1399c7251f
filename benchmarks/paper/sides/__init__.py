"""One file a library: ``python -m benchmarks.paper.sides.LIBRARY JOB OUT.npz``, in its own environment."""
