"""Prototype Memory for PyTorch: fused operators and modules for training embedding models on millions of identities."""

__version__ = "0.1.0"
