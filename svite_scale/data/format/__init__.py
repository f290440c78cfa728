"""What a shard is: its tar file, its index, its labels, and the folder that holds it."""
