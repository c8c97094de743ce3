"""Files of others' making, one module each; none imports another."""
