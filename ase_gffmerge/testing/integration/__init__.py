"""What reading, merging, serving and writing other packages' force fields rely on, as a series of checks of an adapter."""
