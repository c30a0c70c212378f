"""Dense layers are found in a graph and rewritten to contractions of cores."""
