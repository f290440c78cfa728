"""Ranks and processes: who takes part, what stops them, and how a run ends."""
