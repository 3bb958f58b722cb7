"""Molecular dynamics as a source of frames: calibration frames from nothing but a specialist, and the closed loop."""
