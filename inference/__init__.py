"""The engine: everything inside a worker process. Never imports Django."""
