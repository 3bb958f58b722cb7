"""Families of small specialists: a base, and fine-tuned relatives made by perturbing its weights."""

import pytest

from helpers import toys
from helpers.structures import OWN_ARCHITECTURES


@pytest.fixture(params=OWN_ARCHITECTURES)
def architecture(request) -> str:
    return request.param


@pytest.fixture
def family() -> toys.Family:
    """``family(architecture, k, size=...)`` gives k related specialists with frames of different molecules."""
    return toys.family
