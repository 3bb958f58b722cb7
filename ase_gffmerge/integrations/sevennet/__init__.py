"""Force fields of the package SevenNet."""
