"""What ``make release`` finds, on archives made for it; the release itself takes minutes and is run by hand."""

from __future__ import annotations

import io
import tarfile
import zipfile
from pathlib import Path

import pytest

from release import checks, licences, made
from release.running import FindingError

PURE = "protomem_kernels-1-py3-none-any.whl"
NATIVE = "protomem_kernels-1-py3-none-manylinux_2_34_x86_64.whl"


def write_sdist(path: Path, moment: int, names: list[str]) -> None:
    with tarfile.open(path, "w:gz") as archive:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size, member.mtime, member.uname, member.mode = 2, moment, f"user{moment}", 0o600
            archive.addfile(member, io.BytesIO(b"ab"))


def test_an_sdist_is_the_same_whoever_makes_it_and_when(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    packed = []
    for moment, names in ((1, ["a", "b"]), (2_000_000_000, ["b", "a"])):
        path = tmp_path / f"{moment}.tar.gz"
        write_sdist(path, moment, names)
        made._without_times_and_owners(path)
        packed.append(path.read_bytes())
    assert packed[0] == packed[1]
    with tarfile.open(path) as archive:
        assert [(m.name, m.mtime, m.uname, m.mode) for m in archive] == [(n, 1_700_000_000, "", 0o644) for n in "ab"]
        assert archive.extractfile("a").read() == b"ab"


@pytest.fixture
def dist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder with the three files of a tiny release that nothing is wrong with."""
    monkeypatch.setattr(checks, "run", lambda *command: ".gitignore\nsetup.py\n")
    write_sdist(tmp_path / "protomem_kernels-1.tar.gz", 1, ["p-1/setup.py", "p-1/PKG-INFO"])
    for name, own in ((PURE, "_C.missing.txt"), (NATIVE, "_C.so")):
        write_wheel(tmp_path / name, ["protomem_kernels/__init__.py", f"protomem_kernels/{own}"])
    return tmp_path


def write_wheel(path: Path, names: list[str]) -> None:
    with zipfile.ZipFile(path, "w") as wheel:
        for name in [*names, "protomem_kernels-1.dist-info/METADATA"]:
            wheel.writestr(name, "")


def test_what_belongs_there_passes(dist: Path) -> None:
    assert checks.contents(dist).startswith("wheels: the package alone, 2 files")
    assert PURE in checks.sizes(dist)


@pytest.mark.parametrize("stray", ["tests/test_a.py", "protomem_kernels/a.cpp", "protomem_kernels/_C_cuda.so", "b.py"])
def test_what_does_not_belong_into_a_wheel_is_found(dist: Path, stray: str) -> None:
    write_wheel(dist / NATIVE, ["protomem_kernels/__init__.py", "protomem_kernels/_C.so", stray])
    with pytest.raises(FindingError, match=stray):
        checks.contents(dist)


def test_a_file_that_git_has_and_the_sdist_has_not_is_found(dist: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "run", lambda *command: "setup.py\ndocs/new.md\n")
    with pytest.raises(FindingError, match=r"docs/new\.md"):
        checks.contents(dist)


def test_builds_that_differ_are_told(tmp_path: Path) -> None:
    files = [tmp_path / name for name in "abc"]
    for file, content in zip(files, "xxy", strict=True):
        file.write_text(content)
    assert not made.compared(files[:1], files[2:])[0]
    (tmp_path / "again").mkdir()
    (tmp_path / "again" / "a").write_text("x")
    assert made.compared(files[:1], [tmp_path / "again" / "a"])[0]


@pytest.mark.parametrize(
    ("licence", "refused"),
    [("MIT", False), ("BSD-3-Clause AND CC0-1.0", False), ("Apache Software License", False), ("PSF-2.0", False)]
    + [(name, True) for name in ("GPL-3.0-only", "GNU Lesser General Public License v3 (LGPLv3)", "UNKNOWN")],
)
def test_licences_that_ask_for_more_are_refused(licence: str, refused: bool) -> None:
    assert bool(licences.RECIPROCAL.search(licence)) == refused
