"""The costs of a run: multiply-accumulates, bytes of state on each rank, and the paper's table."""
