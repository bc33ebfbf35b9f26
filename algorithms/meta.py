"""Training in two loops."""
