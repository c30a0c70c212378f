"""Layers made of cores."""
