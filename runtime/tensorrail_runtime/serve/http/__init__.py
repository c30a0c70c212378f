"""The HTTP server: routes, limits, metrics, start and stop."""
