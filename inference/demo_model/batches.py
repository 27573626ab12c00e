"""Batches for training, written by background processes while the device computes.

Samples of similar length share a batch; every batch holds about the same number of tokens.
"""

import multiprocessing as mp
import os
import queue
from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from .corpus import Dice, conversation
from .tokenizer import Encoder

LENGTHS = (64, 128, 256, 512, 1024, 2048, 4096)
KEPT = 200

Batch = tuple[np.ndarray, np.ndarray]


def batch_stream(tokenizer: Tokenizer, seed: str, batch_tokens: int) -> Iterator[Batch]:
    """Yield batches without end: ids [rows, length + 1] (uint16) and the mask of the same shape (bool)."""
    dice = Dice(seed)
    encoder = Encoder(tokenizer)
    waiting: dict[int, list[Batch]] = {length: [] for length in LENGTHS}
    while True:
        ids, mask = encoder.encode(conversation(dice))
        length = next((size for size in LENGTHS if len(ids) <= size + 1), None)
        if length is None:
            continue
        rows = waiting[length]
        rows.append((ids, mask))
        if len(rows) * length < batch_tokens:
            continue
        all_ids = np.zeros((len(rows), length + 1), dtype=np.uint16)
        all_masks = np.zeros((len(rows), length + 1), dtype=bool)
        for row, (row_ids, row_mask) in enumerate(rows):
            all_ids[row, : len(row_ids)] = row_ids
            all_masks[row, : len(row_mask)] = row_mask
        rows.clear()
        yield all_ids, all_masks


def _write(tokenizer_json: str, seed: str, batch_tokens: int, batches: Any) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    for batch in batch_stream(Tokenizer.from_str(tokenizer_json), seed, batch_tokens):
        batches.put(batch)


class BatchSource:
    """Gives batches from `writers` processes, and old ones again when they fall behind."""

    def __init__(self, tokenizer: Tokenizer, seed: int, batch_tokens: int, writers: int) -> None:
        """Start the writers."""
        context = mp.get_context("spawn")
        self._queue: Any = context.Queue(maxsize=64)
        self._old: deque[Batch] = deque(maxlen=KEPT)
        self._dice = Dice(seed)
        self.repeated = 0
        text = tokenizer.to_str()
        self._writers = [
            context.Process(target=_write, args=(text, f"{seed} {index}", batch_tokens, self._queue), daemon=True)
            for index in range(writers)
        ]
        for writer in self._writers:
            writer.start()

    def next(self) -> Batch:
        """Return a fresh batch, or an old one when none is ready."""
        enough = len(self._old) == KEPT
        try:
            batch: Batch = self._queue.get(block=not enough, timeout=None if enough else 120)
        except queue.Empty:
            self.repeated += 1
            return self._old[self._dice.between(0, KEPT - 1)]
        self._old.append(batch)
        return batch

    def close(self) -> None:
        """Stop the writers."""
        for writer in self._writers:
            writer.terminate()
