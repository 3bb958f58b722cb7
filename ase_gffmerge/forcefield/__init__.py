"""A force field with everything that belongs to it: weights, history, calibration frames, and the file that holds it."""
