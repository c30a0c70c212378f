"""What runs a served model: replicas on Ray, batching, shadow mode."""
