"""Small worlds that checks run in: samples, a backbone, a context for tasks."""
