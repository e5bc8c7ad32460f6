"""What a plugin author reads: the base classes of every family, and what they hand to one another.

Imports nothing of upbench but its errors.
"""
