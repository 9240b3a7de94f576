"""Entry points of the command line that belong to no other part of the library."""
