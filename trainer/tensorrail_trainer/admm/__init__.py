"""ADMM toward low tensor rank."""
