"""Writing shards: from image folders, data sets that come with Python packages, and tars of others."""
