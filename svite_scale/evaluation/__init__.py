"""Evaluation of a saved run or of exported weights: accuracy, calibration, confusion, throughput."""
