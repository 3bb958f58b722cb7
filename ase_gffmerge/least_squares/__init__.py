"""Least squares on tensors: Gram statistics, ridge regression, Gauss-Newton steps."""
