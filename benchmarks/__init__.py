"""The benchmark suite: ``protomem bench`` runs it, and so does ``python -m pytest benchmarks``.

One file per operator (``bench_<operator>.py``), one for the whole training step, and ``quick.py`` with the figures
that the project holds itself to. ``inputs.py``: the sizes and the data; ``peers.py``: whom we are measured against;
``ratio.py``: how two things are timed against each other; ``memory.py``: how peak memory is measured.
"""
