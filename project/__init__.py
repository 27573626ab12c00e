"""The demo site: a Django project that uses `mlx_serving` as any other project would."""
