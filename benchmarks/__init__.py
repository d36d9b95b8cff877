"""The benchmark suite: ``python -m benchmarks`` runs it, as ``protomem bench`` and ``python -m pytest benchmarks`` do.

One file per operator (``bench_<operator>.py``), one for the whole training step, and ``quick.py`` with the figures
that the project holds itself to. ``inputs.py``: the sizes and the data; ``peers.py``: whom we are measured against;
``ratio.py``: how two things are timed against each other; ``memory.py``: how peak memory is measured. ``command.py``:
the command, with its tables; ``results.py``: its files; ``plots.py``: its pictures. ``static/``: what can be known of a
kernel without a GPU.
"""
