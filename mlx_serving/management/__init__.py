"""Home of the management commands."""
