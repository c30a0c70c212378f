"""The latency regression gate: baselines, checks, outputs for CI systems."""
