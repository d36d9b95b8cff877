"""Lays the Triton kernels out as a kernel for Hugging Face's Hub: ``python -m release.hub_layout FOLDER``.

FOLDER becomes what their kernel-builder takes: build.toml, flake.nix, and torch-ext/prototype_memory/ with the package
of release/hub/package.py, the files of protomem_kernels that it imports, and those that they import. Every import
within is relative, as the Hub asks, since several versions may be loaded into one process.
"""

from __future__ import annotations

import ast
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "protomem_kernels"
HUB = ROOT / "release" / "hub"
NAME = "prototype_memory"
IMPORT = re.compile(r"^(\s*)from protomem_kernels((?:\.\w+)*) import ", re.MULTILINE)


def lay_out(folder: Path) -> list[Path]:
    """Write the layout into a folder; return the Python files of the kernel."""
    package = folder / "torch-ext" / NAME
    shutil.rmtree(package, ignore_errors=True)
    package.mkdir(parents=True)
    for name in ("build.toml", "flake.nix"):
        shutil.copy2(HUB / name, folder / name)
    shutil.copy2(ROOT / "LICENSE", folder / "LICENSE")
    shutil.copy2(HUB / "package.py", package / "__init__.py")
    waiting, written = list(_imported(HUB / "package.py", Path("__init__.py"))), [package / "__init__.py"]
    while waiting:
        module = waiting.pop()
        target = package / module
        if target in written:
            continue
        waiting += _imported(PACKAGE / module, module)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(_with_relative_imports(module))
        written.append(target)
    for inner in {parent for file in written for parent in file.relative_to(package).parents} - {Path(".")}:
        (package / inner / "__init__.py").write_text("")  # those of protomem_kernels know all its backends
    check(package)
    return written


def _with_relative_imports(module: Path) -> str:
    """Return a file of the package whose imports go up from its own folder: a dot for that, one for each above it."""
    dots = "." * len(module.parts)

    def relative(found: re.Match[str]) -> str:
        indent, name = found.groups()
        return f"{indent}from {dots}{name.removeprefix('.')} import "

    return IMPORT.sub(relative, (PACKAGE / module).read_text())


def _imported(path: Path, module: Path) -> Iterator[Path]:
    """Yield the files of the package that a module imports, relative to the package."""
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom):
            continue
        if node.level:
            parts = (*module.parent.parts, *(node.module or "").split("."))
        elif (node.module or "").split(".")[0] == PACKAGE.name:
            parts = tuple(node.module.split(".")[1:])
        else:
            continue
        for name in node.names:
            here = Path(*parts, f"{name.asname or name.name}.py")
            yield here if (PACKAGE / here).exists() else Path(*parts).with_suffix(".py")


def check(package: Path) -> None:
    """Hold the layout to the builder's rules: relative imports, beside torch and triton; no operators of its own.

    Raises:
        ValueError: a file breaks one.
    """
    if (package / NAME).exists():
        raise ValueError(f"{package} must not hold {NAME}")
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            roots = set()
            if isinstance(node, ast.Import):
                roots = {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                roots = {(node.module or "").split(".")[0]}
            elif isinstance(node, ast.Attribute) and ast.unparse(node).startswith(("torch.library.", "torch.ops.")):
                raise ValueError(f"{path}:{node.lineno} {ast.unparse(node)}: operators need the namespace of the build")
            if foreign := roots - {"torch", "triton"} - sys.stdlib_module_names:
                raise ValueError(f"{path}:{node.lineno} imports {sorted(foreign)}")


if __name__ == "__main__":
    for file in lay_out(Path(sys.argv[1])):
        print(file)
