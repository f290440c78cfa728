"""Numbers of active weights of each layer, and their first positions."""
