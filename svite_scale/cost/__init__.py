"""What a run will cost: multiply-accumulates, bytes of state on each rank, and the paper's table."""
