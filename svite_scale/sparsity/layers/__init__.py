"""Layers whose weights are packed: one by one, in blocks, or by heads and neurons."""
