"""Faults in ``margins``."""

from tests.faults.fault import Fault

T_MARGINS = "tests/test_margins.py"

FAULTS = [
    Fault(
        "margin subtracted from the angle",
        "margins.py",
        "return cosine * m.cos() - safe_sine(cosine) * m.sin()",
        "return cosine * m.cos() + safe_sine(cosine) * m.sin()",
        T_MARGINS,
    ),
    Fault(
        "guard missing",
        "margins.py",
        "torch.where(cosine >= -m.cos(), add_angle(cosine, m), cosine - m * m.sin())",
        "add_angle(cosine, m)",
        T_MARGINS,
    ),
    Fault(
        "derivative unbounded at one",
        "margins.py",
        "differentiable = squared.clamp(min=floor).sqrt()",
        "differentiable = squared.clamp(min=0).sqrt()",
        T_MARGINS,
    ),
    Fault(
        "AdaFace's statistics follow a single sample",
        "margins.py",
        "torch.where(number > 1, self.momentum, 0.0)",
        "torch.where(number > 0, self.momentum, 0.0)",
        T_MARGINS,
    ),
    Fault(
        "D-Softmax is a plain softmax",
        "margins.py",
        "return softplus(scale * (self.d - cosine)) + softplus(negatives)",
        "return softplus(excess)",
        "tests/test_losses.py::test_d_softmax_against_the_memory",
    ),
]
