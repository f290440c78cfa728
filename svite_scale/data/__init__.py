"""Tar shards with an exact global order."""
