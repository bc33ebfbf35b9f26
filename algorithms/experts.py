"""Mixtures of experts on the features."""
