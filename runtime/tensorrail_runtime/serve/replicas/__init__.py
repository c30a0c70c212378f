"""Runs a served model: replicas on Ray, batching and shadow mode."""
