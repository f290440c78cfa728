"""A saved run's model in forms that others can use, and reading these."""
