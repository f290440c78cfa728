"""The format of a shard: its tar file, its index, its labels, and the folder that holds it."""
