"""Plans for torch modules: by patterns of layer names, by size, by published tables."""
