"""Tracking a run: lines of JSON, MLflow, and a progress bar."""
