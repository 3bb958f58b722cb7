"""Compare merging methods on the same specialists and test frames."""
