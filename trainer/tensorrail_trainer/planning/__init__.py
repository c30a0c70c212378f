"""Plans for torch models: from patterns of layer names, from a target size, or from published tables."""
