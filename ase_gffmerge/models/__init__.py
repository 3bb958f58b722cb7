"""Architectures behind one :class:`~ase_gffmerge.models.potential.Potential` interface."""

from ase_gffmerge.models import e3nn_mode as e3nn_mode  # before e3nn, which it lets be imported
from ase_gffmerge.models.potential import Potential
from ase_gffmerge.models.registry import architectures, build_potential

__all__ = ["Potential", "architectures", "build_potential"]
