"""One small Backend protocol, and the engines behind it."""
