"""What a fault is: a change of one place of the package that its tests must notice."""

from __future__ import annotations

from typing import NamedTuple


class Fault(NamedTuple):
    """Replace ``before`` by ``after`` in ``file`` of the package (once); then ``tests`` must fail."""

    name: str
    file: str
    before: str
    after: str
    tests: str

    @property
    def in_triton(self) -> bool:
        """Whether the fault is in a Triton kernel, which its tests run in the interpreter."""
        return self.file.startswith(("backends/triton/", "backends/chunked/"))
