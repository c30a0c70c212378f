"""The Open Inference Protocol 2: requests, responses and datatypes."""
