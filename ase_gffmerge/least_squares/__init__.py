"""Least squares on tensors: what every merge of this package solves. Tensors in, dataclasses out.

* :mod:`.gram`: sufficient statistics of rows and targets, which add up over batches, processes and machines;
* :mod:`.ridge`: ridge regression from them, anchored at a prior;
* :mod:`.gauss_newton`: one Gauss-Newton step on several affine maps at once, matrix-free, with Hutchinson's estimates of
  traces and diagonals.
"""
