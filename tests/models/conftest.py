"""Models are tested with every architecture."""

import pytest

from ase_gffmerge.models import architectures


@pytest.fixture(params=architectures())
def architecture(request: pytest.FixtureRequest) -> str:
    return request.param
