"""Sibling processes that compile steps of one name and different bodies through one cache on disk."""
