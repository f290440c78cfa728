"""Where a run's numbers go: lines of JSON, MLflow, and a progress bar."""
