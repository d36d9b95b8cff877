"""``protomem`` itself, and ``python -m protomem_kernels``."""

import subprocess
import sys

import pytest

import protomem_kernels.cli as cli


def test_without_the_train_extra(monkeypatch, capsys):
    monkeypatch.setattr(cli, "find_spec", lambda name: None if name in ("typer", "rich") else object())
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    assert capsys.readouterr().err == (
        "error: the protomem command needs rich, typer: pip install 'protomem-kernels[train]'\n"
    )


def test_main_runs_the_application(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["protomem", "train", "--help"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 0
    assert "--refresh-ratio" in capsys.readouterr().out


def test_python_m_is_the_same_command():
    done = subprocess.run(
        [sys.executable, "-m", "protomem_kernels", "train", "--fold", "9"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr == "error: fold must be between 0 and 3, got 9\n"


def test_importing_the_package_leaves_the_extras_alone():
    extras = {"typer", "rich", "PIL", "sklearn", "matplotlib", "tensorboard"}
    code = f"import sys, protomem_kernels; print(sorted({extras} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_env_needs_nothing_but_torch():
    code = (
        "import sys; sys.argv = ['protomem', 'env']; from protomem_kernels.cli import main; main(); "
        "print(sorted({'typer', 'rich', 'PIL', 'sklearn', 'matplotlib', 'tensorboard'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert lines[-1] == "[]"
    assert "reference  yes" in done.stdout
