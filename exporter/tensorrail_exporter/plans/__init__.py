"""Plans, cores and their cost: which layers are factorized, and into which cores."""
