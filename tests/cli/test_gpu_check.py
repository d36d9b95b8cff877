"""``protomem gpu-check`` is ``python -m protomem_kernels gpu-check``, on machines without the ``train`` extra too."""

import subprocess
import sys

import pytest
from typer.testing import CliRunner

import protomem_kernels.cli as cli
from protomem_kernels.cli import gpu_check
from protomem_kernels.cli.app import app


def test_the_command_hands_its_options_on(monkeypatch):
    got = []
    monkeypatch.setattr(gpu_check, "main", lambda arguments: got.append(arguments) or 1)
    assert CliRunner().invoke(app, ["gpu-check", "--minutes", "3", "--parts", "speed"]).exit_code == 1
    assert got == [["--minutes", "3", "--parts", "speed"]]
    assert "gpu-check" in CliRunner().invoke(app, ["--help"]).output


def test_without_the_train_extra(monkeypatch, capsys):
    monkeypatch.setattr(cli, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["protomem", "gpu-check", "--minutes", "0"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    assert "argument --minutes: must be above 0, got 0" in capsys.readouterr().err


def test_python_m_imports_no_extra():
    extras = {"typer", "rich", "PIL", "sklearn", "matplotlib", "tensorboard", "hypothesis", "pytest"}
    code = (
        "import runpy, sys, atexit; sys.argv = ['protomem_kernels', 'gpu-check', '--help']; "
        f"atexit.register(lambda: print(sorted({extras} & set(sys.modules)))); "
        "runpy.run_module('protomem_kernels', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert "--checkout" in done.stdout
