"""The way of a new user, from ``pip install`` to two of his own images beside each other, as the README has it."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from PIL import Image

from tests.training.running import draw_people

ROOT = Path(__file__).parents[2]


def the_five_commands():
    """The one block of the README that begins with an installation and ends with a pair of images."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    (block,) = [block for block in blocks if "protomem verify" in block]
    return [line for line in block.splitlines() if line and not line.startswith("#")]


@pytest.mark.slow
def test_five_commands_lead_from_the_installation_to_a_verified_pair(tmp_path):
    commands = the_five_commands()
    assert len(commands) <= 5
    assert commands[0].startswith("pip install ")
    assert commands[-1].startswith("protomem verify ")
    checkout = tmp_path / "checkout"
    built = ("build", "dist", "runs", "*.egg-info", "__pycache__", "_C*", "tests", ".*")
    shutil.copytree(ROOT, checkout, ignore=shutil.ignore_patterns(*built))
    draw_people(checkout / "photos")
    for number, name in enumerate(("ann", "bob")):
        folder = (checkout / "photos" / f"person{number}").rename(checkout / "photos" / name)
        for image in folder.iterdir():
            Image.open(image).save(image.with_suffix(".jpg"))
            image.unlink()

    # An environment of its own, with a pip that installs into it the package alone: what that needs is taken from here.
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    (site,) = (venv / "lib").glob("python*/site-packages")
    (site / "beside.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    pip = venv / "bin" / "pip"
    pip.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m pip --python "{venv}/bin/python" "$@"\n')
    pip.chmod(0o755)
    environment = {
        "PATH": f"{venv / 'bin'}{os.pathsep}{Path(sysconfig.get_path('scripts'))}{os.pathsep}{os.environ['PATH']}",
        "HOME": str(tmp_path),
        "PROTOMEM_BUILD_CPU": "0",  # half a minute
        "PROTOMEM_BUILD_CUDA": "0",
        "PIP_NO_DEPS": "1",
        "PIP_NO_INDEX": "1",
        "PIP_NO_BUILD_ISOLATION": "0",  # that is pip's way to say that there is none
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "OMP_WAIT_POLICY": "passive",
    }
    said = ""
    for command in commands:
        ran = subprocess.run(command, shell=True, cwd=checkout, env=environment, capture_output=True, text=True)
        assert ran.returncode == 0, f"{command}\n{ran.stdout}{ran.stderr}"
        said = ran.stdout
    assert re.search(r"^cosine +[+-]\d\.\d+\nthreshold .*\nverdict +(one identity|two identities) at FAR", said), said
    assert site.joinpath("protomem_kernels").is_dir()  # it was installed, and not the checkout that ran
