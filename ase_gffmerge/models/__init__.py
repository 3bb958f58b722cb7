"""Architectures behind one :class:`~ase_gffmerge.models.base.Potential` interface."""

from ase_gffmerge.models.base import Potential
from ase_gffmerge.models.registry import architectures, build_potential

__all__ = ["Potential", "architectures", "build_potential"]
