"""Penalties on the risks of the domains."""
