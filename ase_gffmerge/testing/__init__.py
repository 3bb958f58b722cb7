"""Checks for users and developers of calculators, potentials and adapters of other packages.

>>> from ase_gffmerge.testing import check_calculator, check_integration, check_potential
"""

from ase_gffmerge.testing.calculator.checks import check_calculator
from ase_gffmerge.testing.integration.checks import check_integration
from ase_gffmerge.testing.potential import check_potential
from ase_gffmerge.testing.report import CheckReport, CheckResult, ContractError

__all__ = [
    "CheckReport",
    "CheckResult",
    "ContractError",
    "check_calculator",
    "check_integration",
    "check_potential",
]
