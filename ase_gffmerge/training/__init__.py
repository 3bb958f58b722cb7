"""Training of specialists."""
