"""How workers come to be and are reached."""
