"""The rooms and the arrows between them: every import of the package and every include of csrc is read.

A room imports only rooms below it; no arrow runs up, none in a circle. docs/architecture.md draws the same plan.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "protomem_kernels"
CSRC = ROOT / "csrc"

# Room -> the rooms right below it; it may import these and whatever they may. "" is the package's public face. Rooms
# that come with later work have their place already.
BELOW: dict[str, set[str]] = {
    "__main__": {"cli", "gpu_check"},
    "cli": {"experiments", "gpu_check"},
    "experiments": {"training"},
    "gpu_check": {""},  # no cli, training or data: it meets a machine that has torch and nothing else
    "training": {"compat", "data", ""},
    "": {"losses", "graphed", "warm_start", "schedules"},
    "graphed": {"warm_up"},
    "warm_up": {"losses"},
    "warm_start": {"losses"},
    "schedules": {"losses"},
    "sampling": {"data"},  # earlier names of rooms of data, this and the next two
    "evaluation": {"data"},
    "datasets": {"data"},
    "data": {"types", "_checks", "_files", "_warnings"},
    "compat": {"losses"},
    "losses": {"memory", "objective", "quality", "optimizers", "head", "health"},
    "health": {"memory"},
    "head": {"margins", "mining", "shards", "rows"},
    "shards": {"objective"},
    "memory": {"ops", "identities", "state"},
    "objective": {"margins", "mining", "ops"},
    "mining": {"margins", "distributed"},
    "margins": {"distributed", "state", "rows"},
    "quality": {"ops", "distributed", "state"},
    "optimizers": set(),
    "state": {"recomputation"},
    "recomputation": {"_torch"},
    "ops": {"backends", "distributed"},
    "distributed": {"types", "state", "_files", "_torch", "_warnings"},
    "backends": {"rows", "identities", "types", "_files", "_installed", "_switches", "_torch", "_warnings"},
    "identities": {"_checks"},
    "rows": {"types"},
    "types": {"_checks"},
    "_checks": set(),
    "_files": set(),
    "_installed": set(),
    "_switches": set(),
    "_torch": set(),
    "_warnings": set(),
}
# Who computes: nothing outside backends/ imports from these, and none of them from another, but for the one arrow of
# a backend that is built on another one's kernels.
COMPUTING = {"reference", "cpu", "triton", "cuda", "chunked"}
BUILT_ON = {"chunked": "triton"}


def parts(path: Path, package: Path) -> tuple[str, ...]:
    """Return a module's name within the package, in parts: ops/call.py is ("ops", "call"), ops/__init__.py ("ops",)."""
    place = path.relative_to(package).with_suffix("").parts
    return place[:-1] if place[-1] == "__init__" else place


@cache
def modules(package: Path = PACKAGE) -> dict[tuple[str, ...], Path]:
    return {parts(path, package): path for path in sorted(package.rglob("*.py"))}


def imports(path: Path, package: Path = PACKAGE) -> Iterator[str]:
    """Yield the full name of everything that a file imports, wherever in it: "protomem_kernels.ops.call.call"."""
    here = (package.name, *parts(path, package))
    folder = here if path.name == "__init__.py" else here[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(folder[: len(folder) - node.level + 1]) if node.level else ""
            stem = ".".join(filter(None, (base, node.module)))
            yield from (f"{stem}.{alias.name}" for alias in node.names)


def arrows(package: Path = PACKAGE) -> dict[tuple[str, ...], set[tuple[str, ...]]]:
    """Return for every module the modules of the package that it imports."""
    known, found = modules(package), {}
    for name, path in known.items():
        found[name] = set()
        for imported in imports(path, package):
            first, *rest = imported.split(".")
            if first == package.name:
                target = tuple(rest)
                while target not in known:
                    target = target[:-1]
                found[name].add(target)
    return found


def room(name: tuple[str, ...]) -> str:
    return name[0] if name else ""


@cache
def reachable(name: str) -> frozenset[str]:
    return frozenset({name}.union(*(reachable(below) for below in BELOW[name])))


def upward(package: Path = PACKAGE) -> list[str]:
    """Return the arrows that do not run down."""
    wrong = []
    for name, targets in arrows(package).items():
        for target in targets:
            if room(name) not in BELOW or room(target) not in reachable(room(name)):
                wrong.append(f"{'.'.join(name) or 'the public face'} -> {'.'.join(target) or 'the public face'}")
    return wrong


def borrowed(package: Path = PACKAGE) -> list[str]:
    """Return the arrows into a backend from elsewhere; ``choice`` alone knows them all."""
    wrong = []
    for name, targets in arrows(package).items():
        for target in targets:
            into = target[1] if target[:1] == ("backends",) and len(target) > 1 else ""
            below = into in COMPUTING and len(name) > 1 and BUILT_ON.get(name[1]) == into
            inside = name[:2] == ("backends", into) or name == ("backends", "choice") or below
            if into in COMPUTING and not inside:
                wrong.append(f"{'.'.join(name)} -> {'.'.join(target)}")
    return wrong


def test_every_room_has_its_place() -> None:
    assert {room(name) for name in modules()} <= set(BELOW)
    TopologicalSorter(BELOW).prepare()


def test_no_arrow_runs_up() -> None:
    assert upward() == []


def test_nothing_borrows_from_a_backend() -> None:
    assert borrowed() == []


def test_no_arrows_run_in_a_circle() -> None:
    TopologicalSorter(arrows()).prepare()


def test_nothing_installed_looks_for_the_checkout() -> None:
    """Neither by an import nor by a way from its own place to outside the package."""
    for name, path in modules().items():
        outside = [
            found for found in imports(path) if found.split(".")[0] in ("benchmarks", "tests", "setup", "examples")
        ]
        assert outside == [], path
        depth = len(path.relative_to(PACKAGE).parts)
        text = path.read_text(encoding="utf-8")
        steps = [int(step) + 1 for step in re.findall(r"\.parents\[(\d+)\]", text)]
        steps += [chain.count(".parent") for chain in re.findall(r"(?:\.parent\b)+", text)]
        assert all(step <= depth for step in steps), (name, steps)


def test_private_names_of_torch_stand_in_one_file() -> None:
    for name, path in modules().items():
        private = re.findall(
            r"torch\._(?:C|functorch|dynamo|inductor|ops|dispatch)\b.*", path.read_text(encoding="utf-8")
        )
        assert name == ("_torch",) or private == [], path


# The same test, turned on itself: an arrow that is turned round is found


@pytest.mark.parametrize(
    ("file", "line", "finds"),
    [
        ("rows.py", "from protomem_kernels.ops import enqueue_", upward),
        ("ops/call.py", "from protomem_kernels.memory import PrototypeMemory", upward),
        ("training/loop.py", "def f():\n    from protomem_kernels.cli import errors", upward),
        ("data/images.py", "import protomem_kernels.training.loop", upward),
        ("memory.py", "from protomem_kernels.backends.reference import enqueue", borrowed),
        ("backends/triton/launch.py", "from ..cuda import Build", borrowed),
        ("backends/triton/launch.py", "from ..chunked import products", borrowed),
        ("backends/chunked/products.py", "from ..reference import _rows", borrowed),
    ],
)
def test_a_planted_arrow_is_found(file: str, line: str, finds: object, tmp_path: Path) -> None:
    package = tmp_path / PACKAGE.name
    for path in modules().values():
        copied = package / path.relative_to(PACKAGE)
        copied.parent.mkdir(parents=True, exist_ok=True)
        copied.write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
    assert finds(package) == []
    planted = package / file
    planted.write_text(planted.read_text(encoding="utf-8") + f"\n{line}\n", encoding="utf-8")
    assert len(finds(package)) == 1


def test_a_planted_circle_is_found() -> None:
    circle = arrows() | {("rows",): {("objective",)}}
    with pytest.raises(CycleError):
        TopologicalSorter(circle).prepare()


# C++

# Folder of csrc -> the folders that its files may include from, besides their own. "" is csrc itself: what both devices
# share. csrc/cpu itself and csrc/cuda itself hold the operators, which know no operator but their own.
INCLUDES: dict[str, set[str]] = {
    "": {"cpu"},  # bindings.cpp, the module
    "cpu": {"cpu/base", ""},
    "cpu/base": {""},
    "cuda": {"cuda/base", ""},
    "cuda/base": {"", "cuda_host"},  # under PROTOMEM_HOST
    "cuda_host": set(),
}


def included() -> Iterator[tuple[Path, Path]]:
    for path in sorted(CSRC.rglob("*")):
        if path.suffix in (".h", ".cpp", ".cu", ".cuh"):
            for name in re.findall(r'^#include "([^"]+)"', path.read_text(encoding="utf-8"), flags=re.MULTILINE):
                yield path, (path.parent / name).resolve()


def folder(path: Path) -> str:
    place = path.parent.relative_to(CSRC).as_posix()
    return "" if place == "." else place


def test_includes_run_down() -> None:
    seen: dict[Path, set[Path]] = {}
    for path, target in included():
        assert target.is_relative_to(CSRC), f"{path} includes {target}, which is outside csrc"
        assert target.exists(), f"{path} includes {target}, which is not there"
        here, there = folder(path), folder(target)
        assert here == there or there in INCLUDES[here], f"{path} includes {target}"
        seen.setdefault(path, set()).add(target)
    TopologicalSorter(seen).prepare()


def test_an_operator_includes_no_other() -> None:
    """In csrc/cpu and csrc/cuda; what several of them share lies in base/. The tables of csrc/cpu name them all."""
    tables = {"kernels.h", "isa.cpp"}
    for path, target in included():
        if folder(path) == folder(target) and folder(path) in ("cpu", "cuda") and path.name not in tables:
            names = {file.name.split(".")[0] for file in (path, target)}
            assert len(names) == 1 or target.name in ("capability.h", "kernels.h"), f"{path} includes {target}"
