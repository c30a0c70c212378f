"""`python -m tensorrail`: the command line, without its script."""

from tensorrail.cli import main

main()
