"""Plans, cores and what they cost: which layers become which cores."""
