"""What is published, built so that equal sources make equal bytes: an sdist, and two wheels out of it."""

from __future__ import annotations

import gzip
import hashlib
import os
import tarfile
import time
from pathlib import Path

from release.running import ROOT, python, run, say, tool

# libtorch_cpu is the user's own PyTorch, whichever it is: it is never copied into the wheel.
NOT_OURS = "libtorch*.so*", "libc10*.so*"


def be_reproducible() -> None:
    """Give everything the time of the last commit."""
    os.environ["SOURCE_DATE_EPOCH"] = run("git", "log", "-1", "--format=%ct").strip()
    os.environ["PYTHONHASHSEED"] = "0"


def everything(folder: Path) -> list[Path]:
    """Build sdist, pure wheel and native wheel into a folder; return the three."""
    folder.mkdir(parents=True)
    sdist = _sdist(ROOT, folder)
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    sources = folder / sdist.name.removesuffix(".tar.gz")
    pure = _wheel(sources, folder / "pure", PROTOMEM_BUILD_CPU="0")
    native = _wheel(sources, folder / "linux", PROTOMEM_BUILD_CPU="1")
    excluded = [f"--exclude={pattern}" for pattern in NOT_OURS]
    tool("auditwheel", "repair", *excluded, "--wheel-dir", folder / "native", native)  # as old a glibc as it can be
    (native,) = (folder / "native").iterdir()
    return [sdist, pure, native]


def compared(first: list[Path], second: list[Path]) -> tuple[bool, str]:
    """Say whether two builds gave the same files, and which did not."""
    other = [a.name for a, b in zip(first, second, strict=True) if _digest(a) != _digest(b) or a.name != b.name]
    return not other, f"not the same bytes: {', '.join(other)}" if other else "the same bytes, in different folders"


def _sdist(checkout: Path, to: Path) -> Path:
    python("-m", "build", "--sdist", "--no-isolation", "--outdir", to, cwd=checkout)
    (sdist,) = to.glob("*.tar.gz")
    _without_times_and_owners(sdist)
    return sdist


def _wheel(sources: Path, to: Path, **environment: str) -> Path:
    begin = time.monotonic()
    # No CUDA part: no GPU has run it yet, and who has one builds it for its own (docs/cuda.md).
    environment |= {"PROTOMEM_BUILD_CUDA": "0"}
    python("-m", "build", "--wheel", "--no-isolation", "--outdir", to, cwd=sources, **environment)
    (wheel,) = to.iterdir()
    say(f"{wheel.name} in {time.monotonic() - begin:.0f} s")
    return wheel


def _without_times_and_owners(path: Path) -> None:
    """Write a tar.gz again, in the order of names, at the time of the last commit: setuptools leaves both to chance."""
    moment = int(os.environ["SOURCE_DATE_EPOCH"])
    temporary = path.with_suffix(".new")
    with (
        tarfile.open(path) as old,
        temporary.open("wb") as file,
        gzip.GzipFile("", "wb", 9, file, moment) as packed,
        tarfile.open(fileobj=packed, mode="w") as new,
    ):
        for member in sorted(old.getmembers(), key=lambda member: member.name):
            member.mtime, member.uid, member.gid, member.uname, member.gname = moment, 0, 0, "", ""
            member.mode = 0o755 if member.isdir() or member.mode & 0o100 else 0o644
            member.pax_headers = {}
            new.addfile(member, old.extractfile(member) if member.isfile() else None)
    temporary.replace(path)


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
