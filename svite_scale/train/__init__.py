"""The training run: loop, optimizer groups and schedules, checkpoints, tracking, progress."""
