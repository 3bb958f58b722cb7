"""Molecular dynamics of many structures in one batch, and what stops a run that goes wrong."""
