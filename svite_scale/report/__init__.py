"""What is made of a run once it is saved: pictures of it, in one process, whatever engine and number of ranks saved it."""
