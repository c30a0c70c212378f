"""A run from recipe to report: training phases, export, measurements, and the report."""
