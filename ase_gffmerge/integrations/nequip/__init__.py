"""Force fields of the package NequIP."""
