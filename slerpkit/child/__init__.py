"""What stands in a child beside its weights, how it is verified, and what is told of it."""
