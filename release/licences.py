"""Licences of the packages that an installation brings along: ``python -m release.licences`` prints a table.

Read by pip-licenses out of the development environment, for what pip installs for the package itself and for the extras
``train`` and ``export``. A licence that does not go with Apache-2.0 is a finding.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from release.running import FindingError, python, tool

# What asks for more than notices and names; the words in which pip-licenses tells of what does not.
RECIPROCAL = re.compile(r"\b(A?GPL|GNU|LGPL|SSPL|EUPL|CC-BY-NC|NonCommercial|Proprietary|UNKNOWN)", re.IGNORECASE)
# Says so in its metadata's text alone, which pip-licenses does not take for an answer.
TOLD_ELSEWHERE = {"setuptools": "MIT"}
WHOSE = {"": "the package", "train": "`[train]`", "export": "`[export]`"}
CLOSURE = """
import json, re
from importlib.metadata import requires, PackageNotFoundError
from packaging.requirements import Requirement
def walk(name, extra):
    try:
        wanted = [Requirement(line) for line in requires(name) or []]
    except PackageNotFoundError:
        return
    for each in wanted:
        plain = re.sub("[-_.]+", "-", each.name).lower()
        if plain not in found and (each.marker is None or each.marker.evaluate({"extra": extra})):
            found[plain] = whose
            walk(each.name, "")
found = {"protomem-kernels": None}
for whose in ("", "train", "export"):
    walk("protomem-kernels", whose)
print(json.dumps(found))
"""


def licences() -> dict[str, tuple[str, str]]:
    """Return each package's licence, and the extra that brings it along ("" for none)."""
    whose = json.loads(python("-c", CLOSURE))
    told = json.loads(
        tool("pip-licenses", f"--python={sys.executable}", "--format=json", "--from=mixed", "--with-system")
    )
    by_name = {re.sub("[-_.]+", "-", each["Name"]).lower(): each["License"] for each in told}
    return {
        name: (TOLD_ELSEWHERE.get(name, by_name[name]), extra)
        for name, extra in sorted(whose.items())
        if extra is not None and name in by_name
    }


def check(_: Path) -> str:
    """Every licence goes with Apache-2.0."""
    found = licences()
    if wrong := {name: licence for name, (licence, _) in found.items() if RECIPROCAL.search(licence)}:
        raise FindingError(f"these do not go with Apache-2.0: {wrong}")
    return f"{len(found)} packages, all under licences that go with Apache-2.0 (docs/licences.md)"


if __name__ == "__main__":
    print("| package | licence | comes with |\n|---|---|---|")
    for package, (licence, extra) in licences().items():
        print(f"| {package} | {licence} | {WHOSE[extra]} |")
