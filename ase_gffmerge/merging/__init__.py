"""Closed-form merging of specialist force fields."""
