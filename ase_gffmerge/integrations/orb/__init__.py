"""Force fields of the package Orb."""
