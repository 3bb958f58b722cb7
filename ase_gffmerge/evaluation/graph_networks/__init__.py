"""Merges of graph neural networks for node classification and link prediction, method beside method."""
