"""Datasets, one module each; found by the registry. `upbench.contracts.dataset` holds what they share."""
