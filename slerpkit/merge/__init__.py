"""What is decided of every tensor, and the child made of it: plan, workers, staging folder."""
