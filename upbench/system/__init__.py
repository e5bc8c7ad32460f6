"""The machine underneath: cache, downloads, checkpoint files, progress, environment."""
