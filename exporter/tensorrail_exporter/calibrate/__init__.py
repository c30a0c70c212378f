"""Cores fitted to what a network does on calibration inputs."""
