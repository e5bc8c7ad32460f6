"""Dense features: the view of a split through a method, tiles of large outputs, cameras, precision."""
