"""The engine that prunes and grows during training."""
