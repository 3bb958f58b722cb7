"""Molecular dynamics as a source of frames: many replicas at once, calibration frames, the closed loop."""
