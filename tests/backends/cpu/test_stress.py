"""The kernels on std::thread, without Python or PyTorch, under the sanitizers: the programs in stress/."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import NoReturn

import pytest

FOLDER = Path(__file__).parent / "stress"
PROGRAMS = sorted(path.stem for path in FOLDER.glob("stress_*.cpp"))
# As in CMakeLists.txt, for the instructions that this machine has.
FLAGS = ["-std=c++20", "-O1", "-g1", "-Wall", "-Wextra", "-DPROTOMEM_ISA=stress", "-march=native", "-ffp-contract=fast"]
REQUIRED = os.environ.get("PROTOMEM_STRESS") == "required"  # make sanitize: nothing may be left out
COMPILER = os.environ.get("CXX", "").split(" ")[0] or "g++"


def leave_out(reason: str) -> NoReturn:
    pytest.fail(reason) if REQUIRED else pytest.skip(reason)


def compile_program(source: Path, sanitizer: str, program: Path) -> subprocess.CompletedProcess[str]:
    sanitize = [f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-pthread"]
    command = [COMPILER, *FLAGS, *sanitize, source, "-o", program]
    return subprocess.run(command, capture_output=True, text=True)


def execute(launcher: list[str], program: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*launcher, program], capture_output=True, text=True)


@pytest.fixture(scope="module", params=["thread", "address,undefined"])
def sanitizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[str]]:
    """Return a sanitizer that works here, and how its programs are started."""
    if shutil.which(COMPILER) is None:
        leave_out(f"there is no {COMPILER}")
    folder = tmp_path_factory.mktemp("probe")
    (folder / "probe.cpp").write_text("int main() {}")
    compiled = compile_program(folder / "probe.cpp", request.param, folder / "probe")
    if compiled.returncode != 0:
        leave_out(f"{COMPILER} has no sanitizer {request.param} here: {compiled.stderr}")
    # Without setarch the random places of mappings may be some that ThreadSanitizer does not know.
    launchers = [["setarch", "-R"], []] if shutil.which("setarch") else [[]]
    for launcher in launchers:
        started = execute(launcher, folder / "probe")
        if started.returncode == 0:
            return request.param, launcher
    leave_out(f"what -fsanitize={request.param} builds does not start here: {started.stderr}")


@pytest.mark.slow
@pytest.mark.parametrize("program", PROGRAMS)
def test_stress_program_is_clean(sanitizer: tuple[str, list[str]], program: str, tmp_path: Path) -> None:
    name, launcher = sanitizer
    compiled = compile_program(FOLDER / f"{program}.cpp", name, tmp_path / program)
    assert compiled.returncode == 0, compiled.stderr
    process = execute(launcher, tmp_path / program)
    assert process.returncode == 0, process.stderr
    assert process.stdout.endswith(": ok\n")
    assert process.stderr == ""


RACE = "int sum = 0;  std::thread a([&] { sum++; }), b([&] { sum++; });  a.join(), b.join();"
STEP = "std::vector<int> sums(1);  sums.data()[count] = 1;"


def test_a_race_and_a_step_past_the_end_are_seen(sanitizer: tuple[str, list[str]], tmp_path: Path) -> None:
    name, launcher = sanitizer
    fault, message = {"thread": (RACE, "data race"), "address,undefined": (STEP, "heap-buffer-overflow")}[name]
    (tmp_path / "fault.cpp").write_text(
        f"#include <thread>\n#include <vector>\nint main(int count, char**) {{ (void)count;  {fault} }}\n"
    )
    compiled = compile_program(tmp_path / "fault.cpp", name, tmp_path / "fault")
    assert compiled.returncode == 0, compiled.stderr
    process = execute(launcher, tmp_path / "fault")
    assert process.returncode != 0
    assert message in process.stderr
