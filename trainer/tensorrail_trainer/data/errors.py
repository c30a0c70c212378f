"""The error of everything that reads data."""


class DataError(ValueError):
    """Data that cannot be read; one line with the file or folder, what was expected and what to try."""
