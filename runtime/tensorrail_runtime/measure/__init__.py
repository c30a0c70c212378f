"""What is measured by running models: latency, parity, accuracy, placement, memory."""
