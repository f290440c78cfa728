"""Fetching shards from other machines into a bounded folder."""
