"""Derivatives by central differences, with what is known about their error."""

from collections.abc import Callable
from itertools import pairwise

import numpy as np

from ase_gffmerge.testing.calculator.harness import deviation

RELATIVE = 1e-5
"""Largest share of a derivative that its error may be said to be: a check must not pass for want of smoothness."""


def derivative(central: Callable[[float], np.ndarray], step: float) -> tuple[np.ndarray, float]:
    r"""Central differences extrapolated to step zero, and how far they can be trusted.

    With :math:`D(h) = f' + a h^2 + b h^4 + \dots` Richardson's :math:`R(h) = (4 D(h) - D(2h))/3` errs by
    :math:`-4 b h^4`, and :math:`R(2h)` by 16 times that. Their difference is therefore 15 times the error of
    :math:`R(h)` where the steps are small, holds terms of higher order where they are not, and round-off.

    Parameters
    ----------
    central
        Central differences of a step.
    step
        The smallest of the three steps, which are ``step``, ``2 * step`` and ``4 * step``.

    Returns
    -------
    derivative
        R(step).
    error
        Largest difference between R(step) and R(2 step), at most ``RELATIVE`` times the largest derivative.
    """
    slopes = [central(factor * step) for factor in (1, 2, 4)]
    fine, coarse = ((4 * short - long) / 3 for short, long in pairwise(slopes))
    return fine, min(deviation(fine, coarse), RELATIVE * float(np.abs(fine).max(initial=0.0)))
