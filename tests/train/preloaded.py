"""What the ranks of a job import, for the server that forks them: no threads start and no device is touched by it."""

import timm.data
import timm.models

import svite_scale.train.command
import svite_scale.train.trainer

__all__ = ["svite_scale", "timm"]
