"""An adversary that must not tell the domains apart."""
