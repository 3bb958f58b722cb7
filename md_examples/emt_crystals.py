"""A merged force field for crystals of copper and of silver, whose teacher, ASE's EMT, is there to compare with.

The bundled specialists were trained by ``build_emt_crystals.py``: tiny, but of one base, as specialists must be. EMT
answers in milliseconds, so every number of a crystal can be checked against the source of the labels.
"""

from ase_gffmerge import GFFMergeCalculator

SPECIALISTS = ("emt-copper", "emt-silver")
RECIPE = {"preset": "closed-form", "select": False, "readout": {"width": 64, "copies": 1}}
LATTICE = {"Cu": 3.59, "Ag": 4.06}
"""Lattice constants in Å, about; where searches start."""


def merged_emt() -> GFFMergeCalculator:
    """Merge both specialists, in seconds; found in the cache from then on."""
    return GFFMergeCalculator(SPECIALISTS, recipe=RECIPE, dtype="float64", device="cpu")
