"""ADMM in the trainers of other libraries: `transformers` and `lightning`, each in a module of its own."""
