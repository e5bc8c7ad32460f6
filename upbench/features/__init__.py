"""Backbones, and the features that they compute."""

from upbench._lazy import lazily

__getattr__, __dir__ = lazily(__name__, {"upbench.features.store": "FeatureSet cached_features"})
