"""Datasets, one module each; found by the registry. `upbench.datasets.base` holds what they share."""
