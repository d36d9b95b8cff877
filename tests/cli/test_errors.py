"""What a command says of errors and warnings."""

import warnings

import pytest

from protomem_kernels.cli.errors import errors_in_one_line


@pytest.mark.filterwarnings("always")
def test_a_warning_is_its_words_alone_and_those_of_others_stay(capsys, monkeypatch):
    def command():
        monkeypatch.setattr(warnings, "showwarning", shown)
        warnings.warn("the batch\nis small", stacklevel=1)
        warnings.warn("old", FutureWarning, stacklevel=1)

    def shown(message, category, filename, lineno, file=None, line=None):
        print(warnings.formatwarning(message, category, filename, lineno, line), end="")

    usual = warnings.formatwarning
    errors_in_one_line(command)()
    said = capsys.readouterr().out
    assert said.startswith("warning: the batch is small\n")
    assert f"{__file__}:" in said.removeprefix("warning: the batch is small\n")
    assert said.count("FutureWarning: old") == 1
    assert warnings.formatwarning is usual
