"""Errors against labels, molecular dynamics, plots."""
