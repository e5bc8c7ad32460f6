"""Protocols, one file a family."""
