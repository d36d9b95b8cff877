"""A fuzz of the package against oracles of its own: ``python -m tests.fuzz --seconds 600`` or ``make fuzz``.

A *case* is a subject and a seed, and nothing else: ``python -m tests.fuzz --seed N --only NAME`` runs it again.
``draw`` makes inputs out of a seed, ``oracles`` say what is right in plain PyTorch and plain Python, ``subjects`` hold
the package to it by ``verdict``, ``places`` are the backends that serve, ``known`` names findings that wait to be
mended, ``run`` runs cases in processes of their own, so that a crash is a finding with a seed as well.
"""
