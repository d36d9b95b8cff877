"""First contact with a GPU: ``protomem gpu-check``, also ``python -m protomem_kernels gpu-check``.

It meets a machine that has nothing but torch (and pytest, for its last part): the standard library, torch and numpy are
all it needs, and the checkout need not be installed. The parts, in the order of value (``plan``), share a budget of
time. Every task is a process of its own (``processes``) that appends what it finds to one file, line by line
(``records``): no failure stops the next task, and a check that is killed leaves what it had.
"""

from protomem_kernels.gpu_check.command import main

__all__ = ["main"]
