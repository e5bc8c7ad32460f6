"""Datasets as other libraries describe them."""
