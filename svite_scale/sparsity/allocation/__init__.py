"""How many weights of each layer are active, and which."""
