"""How stable a force field is in molecular dynamics, and whether it visits the right structures."""
