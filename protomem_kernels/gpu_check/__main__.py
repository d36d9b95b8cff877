"""One task of a check, in a process of its own: ``python -m protomem_kernels.gpu_check JSON`` (``processes``)."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

from protomem_kernels.gpu_check.plan import PARTS
from protomem_kernels.gpu_check.processes import die_with
from protomem_kernels.gpu_check.records import Record

if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    die_with(given["parent"])
    warnings.simplefilter("default")
    record = Record(Path(given["lines"]), given["began"], given["part"], given["name"])
    sys.exit(PARTS[given["part"]].run(record, given["name"], given["first"], Path(given["checkout"])))
