"""Architectures behind one :class:`~ase_gffmerge.models.base.Potential` interface."""

from ase_gffmerge.models.base import Potential, architectures, build_potential

__all__ = ["Potential", "architectures", "build_potential"]
