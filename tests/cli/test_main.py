"""``protomem`` itself, and ``python -m protomem_kernels``."""

import io
import os
import re
import subprocess
import sys

import pytest
from typer.testing import CliRunner

import benchmarks.command as benchmarks_command
import protomem_kernels as pmk
import protomem_kernels.cli as cli
from protomem_kernels.cli.app import app
from tests.training.running import protomem


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


def test_version():
    result = protomem("--version")
    assert (result.exit_code, result.stdout) == (0, f"protomem_kernels {pmk.__version__}\n")


def test_every_help_has_an_example():
    for command in app.registered_commands:
        name = command.name or command.callback.__name__.replace("_", "-")
        if name == "bench":  # hands --help on to the suite, which a checkout has
            assert "Example: protomem bench " in benchmarks_command.bench.__doc__
            continue
        arguments = [sys.executable, "-m", "protomem_kernels", name, "--help"]
        help = protomem(name, "--help").stdout if name != "gpu-check" else subprocess.check_output(arguments, text=True)
        assert re.search(rf"xample: protomem {name}\b", help), name
    assert "Example: protomem train" in protomem("--help").stdout


def test_a_shell_completes_commands_options_and_choices():
    def completed(words):
        environment = {"_PROTOMEM_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
        return CliRunner().invoke(app, prog_name="protomem", env=environment).stdout.split()

    assert completed("protomem tr") == ["train"]
    assert completed("protomem train --backbone-l") == ["--backbone-learning-rate"]
    assert completed("protomem train --margin ar") == ["arcface"]
    assert completed("protomem train --policy ") == ["fifo", "lru"]
    assert "--install-completion" in protomem("--help").stdout


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_names_that_the_terminal_has_no_letters_for(monkeypatch, encoding):
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2))
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    monkeypatch.setattr(sys, "argv", ["protomem", "train", "--data", "nowhere/人脸"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    name = "人脸" if encoding == "ascii" else "\\u4eba\\u8138"  # click takes ascii for a mistake, and writes UTF-8
    message = f"error: nowhere/{name}: expected a folder with one sub-folder per identity, got nothing there"
    err.flush()
    assert err.buffer.getvalue().decode().split(os.linesep) == [message, ""]
    print("人脸")
    out.flush()
    assert out.buffer.getvalue().decode().split() == ["\\u4eba\\u8138"]
