"""``python -m ase_gffmerge``, as ``torchrun -m`` starts it: the command ``gffmerge``."""

from ase_gffmerge.cli import main

if __name__ == "__main__":
    main()
