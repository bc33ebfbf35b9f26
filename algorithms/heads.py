"""What each domain has of its own."""
