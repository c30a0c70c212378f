"""The networks that recipes can name, and their weights in files."""
