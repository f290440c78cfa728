"""The report of runs: one HTML page, made in one process, whatever engine and number of ranks trained."""
