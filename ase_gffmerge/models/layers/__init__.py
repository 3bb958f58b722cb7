"""Building blocks of the architectures."""

from ase_gffmerge.models.layers import e3nn_compat as e3nn_compat  # before e3nn, which it lets be imported
