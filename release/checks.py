"""What must hold of the files in dist/. Each check returns what it saw, or raises a ``FindingError``."""

from __future__ import annotations

import re
import shutil
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from release import hub_layout, licences
from release.running import ROOT, FindingError, python, run, tool

KINDS = {".py", ".toml", ".typed", ".txt", ".so"}  # what a wheel holds of the package
OLDEST_TORCH = "2.10.0"


def files(dist: Path) -> tuple[Path, Path, Path]:
    """Return sdist, pure wheel and native wheel."""
    (sdist,), (pure,) = dist.glob("*.tar.gz"), dist.glob("*-py3-none-any.whl")
    (native,) = set(dist.glob("*.whl")) - {pure}
    return sdist, pure, native


def names_in(path: Path) -> list[str]:
    """Return the names of an archive's files."""
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as wheel:
            return [name for name in wheel.namelist() if not name.endswith("/")]
    with tarfile.open(path) as sdist:
        return [member.name for member in sdist if member.isfile()]


def sizes(dist: Path) -> str:
    """How large each is."""
    return "\n".join(
        f"{path.name}: {path.stat().st_size / 1024:,.0f} KiB, {len(names_in(path))} files" for path in files(dist)
    )


def contents(dist: Path) -> str:
    """Wheels hold the package and nothing else; the sdist holds what git does, and its own metadata."""
    sdist, pure, native = files(dist)
    package, objects = {}, {pure: set(), native: {"protomem_kernels/_C.so"}}
    for wheel in (pure, native):
        held = set(names_in(wheel))
        package[wheel] = {name for name in held if ".dist-info/" not in name}
        strange = {
            name
            for name in package[wheel]
            if not name.startswith("protomem_kernels/") or Path(name).suffix not in KINDS or "__pycache__" in name
        }
        found = {name for name in held if name.endswith(".so")}
        if strange or found != objects[wheel]:
            raise FindingError(f"{wheel.name} holds {sorted(strange) or sorted(found)}")
    note = {"protomem_kernels/_C.missing.txt"}  # says in the pure wheel why it has no object
    if package[native] ^ package[pure] != objects[native] | note:
        raise FindingError(f"the wheels differ in {sorted(package[native] ^ package[pure])}")
    held = {name.partition("/")[2] for name in names_in(sdist)}
    made = {name for name in held if name.startswith("protomem_kernels.egg-info/")} | {"PKG-INFO", "setup.cfg"}
    tracked = set(run("git", "ls-files").splitlines()) - {".gitignore"}
    if held - made != tracked:
        raise FindingError(f"the sdist and git differ in {sorted((held - made) ^ tracked)[:20]}")
    return f"wheels: the package alone, {len(package[pure])} files; sdist: every file of git's, {len(tracked)}"


def metadata(dist: Path) -> str:
    """``twine check --strict``: would an index show it?"""
    tool("twine", "check", "--strict", *files(dist))
    return f"twine {_version('twine')} --strict: passed"


def wheel_contents(dist: Path) -> str:
    """``check-wheel-contents``: common mistakes."""
    tool("check-wheel-contents", *files(dist)[1:])
    return f"check-wheel-contents {_version('check-wheel-contents')}: OK"


def platform(dist: Path) -> str:
    """``auditwheel``: which Linux it runs on."""
    _, _, native = files(dist)
    shown = " ".join(tool("auditwheel", "show", native).split())
    tags = sorted(set(re.findall(r"(?:many|musl)linux_\d+_\d+_\w+", shown)))
    if not tags or tags[0] not in native.name:
        raise FindingError(f"{native.name} is tagged otherwise than auditwheel says: {shown}")
    newest: dict[str, tuple[int, ...]] = {}
    for family, number in re.findall(r"'(GLIBC|GLIBCXX|CXXABI|GCC)_([\d.]+)'", shown):
        parts = tuple(int(part) for part in number.split("."))
        newest[family] = max(newest.get(family, parts), parts)
    needs = ", ".join(f"{family}_{'.'.join(map(str, parts))}" for family, parts in sorted(newest.items()))
    return f"auditwheel {_version('auditwheel')}: {tags[0]} (needs {needs})"


def torch_abi(dist: Path) -> str:
    """``torch-abi-audit``: PyTorch's stable ABI alone."""
    with tempfile.TemporaryDirectory() as folder:
        python("-m", "zipfile", "-e", files(dist)[2], folder)
        shown = tool("torch-abi-audit", "--check", "torch", "--verbose", Path(folder) / "protomem_kernels")
    found = dict(re.findall(r"^  ([\w ]+):\s+(.*)$", shown, re.MULTILINE))
    if (found.get("Torch ABI"), found.get("Min torch")) != ("STABLE", OLDEST_TORCH):
        raise FindingError(shown)
    stable = re.search(r"stable_shim=\d+, unstable=0", shown)
    return f"torch-abi-audit {_version('torch-abi-audit')}: STABLE, from {OLDEST_TORCH} on ({stable and stable[0]})"


def python_abi(dist: Path) -> str:
    """No symbol of Python's, which is more than its limited API; ``abi3audit`` has a look all the same."""
    _, _, native = files(dist)
    if "-py3-none-" not in native.name:
        raise FindingError(f"{native.name} is bound to one Python")
    with tempfile.TemporaryDirectory() as folder:
        python("-m", "zipfile", "-e", native, folder)
        library = Path(folder) / "protomem_kernels" / "_C.so"
        symbols = run("nm", "--dynamic", "--undefined-only", library).split()
        if found := [name for name in symbols if name.startswith(("Py", "_Py"))]:
            raise FindingError(f"{library.name} asks Python for {found}")
        if paths := [text for text in (str(ROOT), str(Path.home())) if text.encode() in library.read_bytes()]:
            raise FindingError(f"{library.name} tells of {paths}")
        audit = Path(folder) / "_C.abi3.so"
        library.rename(audit)
        shown = tool("abi3audit", "--strict", "--summary", "--assume-minimum-abi3", "3.10", audit)
    told = re.search(r"\d+ extensions scanned; 0 .* 0 ABI violations found", " ".join(shown.split()))
    if told is None:
        raise FindingError(shown)
    return f"asks nothing of Python; abi3audit {_version('abi3audit')}: {told[0]}"


def hub(_: Path) -> str:
    """The Triton kernels as a kernel for Hugging Face's Hub: their own reader of build.toml, their own loader."""
    folder = ROOT / "build" / "hub"
    shutil.rmtree(folder, ignore_errors=True)
    laid = hub_layout.lay_out(folder)
    read = "import sys; from kernels._rust import Build; Build.open(sys.argv[1])"
    tool("python", "-c", read, folder)
    return f"{len(laid)} files in build/hub; kernels {_version('kernels')} reads its build.toml"


def _version(package: str) -> str:
    return tool("python", "-c", f"from importlib.metadata import version; print(version({package!r}))").strip()


ALL: dict[str, Callable[[Path], str]] = {
    "sizes": sizes,
    "contents": contents,
    "metadata": metadata,
    "wheel contents": wheel_contents,
    "platform": platform,
    "PyTorch's ABI": torch_abi,
    "Python's ABI": python_abi,
    "licences": licences.check,
    "Hub layout": hub,
}
