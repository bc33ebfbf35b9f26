"""Domain-specific masks for balance of specificity and invariance."""
