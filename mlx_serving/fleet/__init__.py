"""Models and workers as the app knows them: registry, supervisor, connections to workers."""
