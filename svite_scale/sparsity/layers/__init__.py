"""Layers whose weights are packed, one by one or by heads and neurons."""
