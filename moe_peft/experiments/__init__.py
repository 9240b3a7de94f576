"""The rows of the papers' tables: files, checks, record."""
