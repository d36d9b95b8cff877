"""What can be known about a Triton kernel without a GPU: ``protomem bench --static``, and the compile tests.

``counting.py`` compiles a kernel and counts what came out; ``gpus.py`` holds the limits and the rates that turn the
counts into occupancy and predicted times; ``cut_cross_entropy.py`` and ``liger_kernel.py`` describe the peers' kernels
the way ours describe themselves; ``report.py`` writes the table and the plot. ``python -m benchmarks.static`` runs it.
"""
