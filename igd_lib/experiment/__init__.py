"""What notebooks do: scales, methods, caches, measures, pictures."""
