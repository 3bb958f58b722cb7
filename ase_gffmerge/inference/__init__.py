"""Evaluate a force field that does not change: predictor, compiled and recorded networks, batches, error metrics."""
