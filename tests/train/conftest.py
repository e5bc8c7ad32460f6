"""Fixtures of the tests of training."""

from training import backbone, config, photos, tiny_method

__all__ = ["backbone", "config", "photos", "tiny_method"]
