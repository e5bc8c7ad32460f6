"""Backbones, and the features that they compute."""
