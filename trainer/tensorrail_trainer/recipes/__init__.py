"""Recipes: read and checked, never run."""
