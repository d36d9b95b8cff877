"""Encoders: our own at any size, and timm's."""

import sys
import types

import pytest
import torch
from torch import nn

from protomem_kernels.training import checkpoints, encoders
from protomem_kernels.training.config import TrainConfig
from protomem_kernels.training.steps import Training
from tests.training.running import assert_refused, figures, stop_after, train


@pytest.mark.parametrize("name", ["residual", "residual-pooled"])
@pytest.mark.parametrize("size", [(56, 46), (17, 9), (8, 8)])
def test_the_residual_encoder_takes_any_size(size, name):
    torch.manual_seed(0)
    encoder = encoders.build_encoder(name, channels=3, image_size=size, embedding_dim=10, width=4, dropout=0.1)
    embeddings = encoder(torch.randn(5, 3, *size))
    assert embeddings.shape == (5, 10)
    embeddings.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in encoder.parameters())


class FakeBackbone(nn.Module):
    def __init__(self, size=4):
        super().__init__()
        self.num_features = 6
        self.layer = nn.Conv2d(3, 6, size)

    def forward(self, images):
        return self.layer(images).mean((2, 3))


@pytest.fixture
def timm(monkeypatch):
    asked = []

    def create_model(name, **options):
        asked.append((name, options))
        if options["pretrained"] and name == "weightless":
            raise RuntimeError("No pretrained weights exist for weightless.")
        if name == "unheard":
            raise RuntimeError("Unknown model (unheard)")
        return FakeBackbone(99 if name == "fixed" else 4)

    monkeypatch.setitem(sys.modules, "timm", types.SimpleNamespace(create_model=create_model))
    return asked


@pytest.mark.parametrize("channels", [1, 3])
def test_a_timm_encoder(timm, channels):
    encoder = encoders.build_encoder("resnet18", channels=channels, image_size=(16, 12), embedding_dim=5)
    assert timm == [("resnet18", {"pretrained": False, "num_classes": 0})]
    assert encoder(torch.randn(4, channels, 16, 12)).shape == (4, 5)


def test_a_run_with_a_timm_encoder(tiny, tmp_path, timm):
    assert train(tiny, "--encoder", "resnet18", "--name", "timm").exit_code == 0
    assert figures(tmp_path / "runs" / "timm")["parameters"] == 3 * 6 * 16 + 6 + 6 * 8 + 16


def test_fine_tuning(tiny, tmp_path, timm):
    options = ("--encoder", "resnet18", "--pretrained", "--backbone-learning-rate", "1e-5")
    assert train(tiny, "--name", "whole", *options).exit_code == 0
    assert timm[0] == ("resnet18", {"pretrained": True, "num_classes": 0})
    state = checkpoints.load_checkpoint(tmp_path / "runs" / "whole" / "checkpoint.pt")
    peaks = [(group["initial_lr"], len(group["params"])) for group in state["optimizer"]["param_groups"]]
    assert peaks == [(2e-3, 1), (2e-3, 2), (1e-5, 1), (1e-5, 1)]  # embed and its norm, then the backbone
    stop_after(tmp_path, tiny, 2, "--name", "halves", *options)
    assert train(tiny, "--name", "halves", "--resume", *options).exit_code == 0
    assert figures(tmp_path / "runs" / "halves") == figures(tmp_path / "runs" / "whole")


def test_a_backbone_at_rate_zero_stays_what_it_is(timm):
    config = TrainConfig(encoder="resnet18", image_size=(16, 12), backbone_learning_rate=0.0, embedding_dim=5)
    run = Training(config, channels=3, identities=torch.arange(16), device=torch.device("cpu"))
    before = [p.clone() for p in run.encoder.parameters()]
    run.advance(torch.rand(8, 3, 16, 12), torch.arange(4).repeat(2))
    moved = [not torch.equal(old, new) for old, new in zip(before, run.encoder.parameters(), strict=True)]
    assert moved == [False, False, True, True, True]


def test_a_backbone_with_a_hidden_layer_at_its_end(monkeypatch):
    class Hidden(FakeBackbone):
        def __init__(self):
            super().__init__()
            self.num_features, self.head_hidden_size = 3, 6

    monkeypatch.setitem(sys.modules, "timm", types.SimpleNamespace(create_model=lambda name, **options: Hidden()))
    encoder = encoders.build_encoder("mobilenetv3", channels=3, image_size=(16, 12), embedding_dim=5)
    assert encoder(torch.randn(4, 3, 16, 12)).shape == (4, 5)


def test_a_torchvision_that_does_not_fit_is_one_line(tiny, tmp_path, monkeypatch):
    (tmp_path / "timm.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "timm", raising=False)
    assert_refused(train(tiny, "--encoder", "resnet18"), "timm cannot be imported (operator torchvision::nms does")


@pytest.mark.parametrize("options", [("--pretrained",), ("--backbone-learning-rate", "1e-5")])
def test_the_residual_encoder_has_nothing_to_fine_tune(tiny, options):
    assert_refused(train(tiny, *options), options[0][2:].replace("-", "_"), "'residual'", "timm")


def test_timm_errors(tiny, timm, monkeypatch):
    assert_refused(train(tiny, "--encoder", "unheard"), "timm cannot create", "Unknown model")
    assert_refused(
        train(tiny, "--encoder", "weightless", "--pretrained"), "'weightless' with pretrained weights: No pr"
    )
    assert_refused(train(tiny, "--encoder", "fixed"), "'fixed' cannot take images of 16 x 12")
    monkeypatch.setitem(sys.modules, "timm", None)
    assert_refused(train(tiny, "--encoder", "resnet18"), "timm cannot be imported", "protomem-kernels[timm]")
