"""Modules that have had another name are still there under it."""

import importlib

import pytest


@pytest.mark.parametrize("name", ["sampling", "evaluation"])
def test_an_earlier_name_is_the_same_module_s_content(name):
    earlier = importlib.import_module(f"protomem_kernels.{name}")
    module = importlib.import_module(f"protomem_kernels.data.{name}")
    assert earlier.__all__ == module.__all__
    for public in module.__all__:
        assert getattr(earlier, public) is getattr(module, public)


def test_the_earlier_name_of_two_modules():
    earlier = importlib.import_module("protomem_kernels.datasets")
    for name in ("images", "degradations"):
        module = importlib.import_module(f"protomem_kernels.data.{name}")
        assert all(getattr(earlier, public) is getattr(module, public) for public in module.__all__)
        assert set(module.__all__) < set(earlier.__all__)
