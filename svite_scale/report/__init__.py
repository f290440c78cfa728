"""Pictures of a saved run, drawn in one process, whatever engine and number of ranks saved it."""
