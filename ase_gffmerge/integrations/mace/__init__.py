"""Force fields of the package MACE."""
