"""The Open Inference Protocol 2: requests, responses, datatypes."""
