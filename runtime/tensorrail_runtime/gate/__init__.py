"""The latency regression gate: baselines, checks and reports for CI systems."""
