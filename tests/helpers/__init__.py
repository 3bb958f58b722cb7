"""What several test modules share: toy force fields, structures, springs, processes."""
