"""Modules that several methods are built from. State keys are part of checkpoints: keep the names."""
