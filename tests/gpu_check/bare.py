"""A Python that has torch, numpy and pytest with what these need, and nothing else: no extra, and not our package."""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path


def needed(*names: str) -> set[str]:
    """Return the names of packages and of all that they ask for."""
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        try:
            asked_for = distribution(name).requires or []
        except PackageNotFoundError:  # asked for on other systems
            continue
        if name not in found:
            found.add(name)
            waiting += [re.split(r"[^\w.-]", line)[0] for line in asked_for if "extra ==" not in line]
    return found


def bare_python(folder: Path) -> Path:
    """Make such a Python in a folder, of links into this one's packages, and return it."""
    packages = folder / "packages"
    packages.mkdir()
    for name in needed("torch", "triton", "numpy", "pytest"):
        for file in distribution(name).files or []:
            top = file.parts[0]
            place, link = Path(str(distribution(name).locate_file(top))), packages / top
            if top not in ("..", "__pycache__") and place.exists() and not link.exists():
                link.symlink_to(place)
    environment = folder / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    python = environment / "bin" / "python"
    inside = sysconfig.get_path("purelib", vars={"base": str(environment), "platbase": str(environment)})
    (Path(inside) / "bare.pth").write_text(f"{packages}\n")
    return python
