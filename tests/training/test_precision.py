"""In what an encoder computes, and by what: half precision on a CPU too, compiled or not."""

import functools

import pytest
import torch

from protomem_kernels.training.checkpoints import load_checkpoint
from protomem_kernels.training.config import TrainConfig
from protomem_kernels.training.precision import Precision
from protomem_kernels.training.steps import Training
from tests.training.running import assert_refused, figures, stop_after, train

CPU = torch.device("cpu")


def test_a_cpu_computes_in_float32_unless_told_otherwise():
    for name in ("auto", "float32"):
        chosen = Precision(name, CPU)
        assert (chosen.dtype, chosen.scaler.is_enabled()) == (torch.float32, False)
    assert not Precision("bfloat16", CPU).scaler.is_enabled()
    assert Precision("float16", CPU).scaler.is_enabled()


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_the_encoder_computes_in_it(precision):
    options = {"image_size": (16, 12), "width": 4, "embedding_dim": 8}
    run = Training(TrainConfig(precision=precision, **options), channels=1, identities=torch.arange(16), device=CPU)
    seen = []
    run.encoder.features[0].register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    step = run.advance(torch.rand(8, 1, 16, 12), torch.arange(4).repeat(2))
    assert seen == [getattr(torch, precision)]
    assert step.loss < 1e3


def test_a_run_in_half_precision_resumes(tiny, tmp_path):
    options = ("--precision", "bfloat16")
    assert train(tiny, "--name", "whole", *options).exit_code == 0
    assert train(tiny, "--name", "full").exit_code == 0
    stop_after(tmp_path, tiny, 2, "--name", "halves", *options)
    assert train(tiny, "--name", "halves", "--resume").exit_code == 0
    assert figures(tmp_path / "runs" / "halves") == figures(tmp_path / "runs" / "whole")
    states = [load_checkpoint(tmp_path / "runs" / name / "checkpoint.pt") for name in ("whole", "halves", "full")]
    whole, halves, full = (state["encoder"]["features.0.weight"] for state in states)
    assert torch.equal(whole, halves)
    assert not torch.equal(whole, full)


def test_a_compiled_run_is_the_same_run(tiny, tmp_path, monkeypatch):
    compiled = []
    by_dynamo = functools.partial(torch.compile, backend="eager")  # the compiler's own kernels take it half a minute
    monkeypatch.setattr(torch, "compile", lambda module: compiled.append(module) or by_dynamo(module))
    assert train(tiny, "--name", "plain").exit_code == 0
    assert compiled == []
    assert train(tiny, "--name", "compiled", "--compile").exit_code == 0
    assert len(compiled) == 1
    assert figures(tmp_path / "runs" / "compiled") == figures(tmp_path / "runs" / "plain")
    stop_after(tmp_path, tiny, 2, "--name", "half", "--compile")
    assert train(tiny, "--name", "half", "--resume", "--no-compile").exit_code == 0  # where there is no compiler
    assert len(compiled) == 2
    assert figures(tmp_path / "runs" / "half") == figures(tmp_path / "runs" / "plain")


def test_a_compiler_that_is_not_there_is_one_line(tiny, monkeypatch):
    def refuse(images):
        raise RuntimeError("No working C++ compiler found\nand a page of more")

    monkeypatch.setattr(torch, "compile", lambda module: refuse)
    assert_refused(train(tiny, "--compile"), "cannot run the encoder (No working C++ compiler found); leave out")
