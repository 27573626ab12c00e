"""The small language model that ships with the product, for demos and tests.

Imports neither mlx nor Django, so that settings and tests can name the model cheaply.
"""

from pathlib import Path

MODEL_PATH: Path = Path(__file__).resolve().parent / "model"
MODEL_NAME: str = "mlx-serving-demo"
