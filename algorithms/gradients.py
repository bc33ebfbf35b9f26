"""Directions made of the domains' gradients."""
