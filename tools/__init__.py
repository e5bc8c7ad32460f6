"""What makes the project's data; run from the repository root, not installed."""
