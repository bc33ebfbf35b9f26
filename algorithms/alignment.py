"""Distributions of representations or gradients made alike across domains."""
