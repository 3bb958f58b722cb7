"""The force field in LAMMPS, whose processes each hold a domain of the structure."""
