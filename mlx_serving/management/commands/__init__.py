"""The management commands: one module each, named as the command."""
