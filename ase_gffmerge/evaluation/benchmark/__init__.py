"""What a force field costs: rows of ratios measured in one run."""
