"""Checks of a calculator against the contract that ASE's drivers rely on."""
