"""One short file a command: parse, call one function, print a record."""
