"""Writing shards from image folders and from data sets that come with Python packages, and indexing existing tars."""
