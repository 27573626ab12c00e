"""The byte-level BPE tokenizer of the demo model: trained on the model's own training text, loses no byte.

Digits stand alone, so that arithmetic sees every place; a character outside the vocabulary falls apart into bytes.
"""

import json
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from .chat import CHAT_TEMPLATE, END_OF_TEXT, MARKUP, TURN_END, TURN_START, pieces, render
from .corpus import Conversation, Dice, conversation

SPECIAL = (END_OF_TEXT, TURN_START, TURN_END)
PATTERN = r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s"


def train_tokenizer(seed: int, vocabulary: int, samples: int = 40_000) -> Tokenizer:
    """Train on `samples` conversations; `vocabulary` counts bytes, merges, markup and special tokens."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PATTERN), behavior="isolated")
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_only])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - len(MARKUP),
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    dice = Dice(f"tokenizer {seed}")
    texts = (render(conversation(dice)) for _ in range(samples))
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens(list(MARKUP))
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path, max_length: int) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja."""
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_length,
        "bos_token": None,
        "eos_token": TURN_END,
        "pad_token": END_OF_TEXT,
        "unk_token": None,
        "additional_special_tokens": [TURN_START],
        "add_bos_token": False,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


class Encoder:
    """Turns conversations into token ids and a mask of what is learned."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Keep the tokenizer and the id of every single byte."""
        self._tokenizer = tokenizer
        letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        self._byte_ids: dict[str, list[int]] = {}
        self._letters = letters

    def _spell(self, text: str) -> list[int]:
        ids: list[int] = []
        for character in text:
            if character not in self._byte_ids:
                written = self._letters.pre_tokenize_str(character)[0][0]
                found = [self._tokenizer.token_to_id(byte) for byte in written]
                self._byte_ids[character] = [token for token in found if token is not None]
            ids += self._byte_ids[character]
        return ids

    def encode(self, sample: Conversation) -> tuple[np.ndarray, np.ndarray]:
        """Return ids [tokens] (uint16) and the mask [tokens] (bool) of the tokens to learn."""
        parts = pieces(sample)
        encoded = self._tokenizer.encode_batch([part.text for part in parts], add_special_tokens=False)
        ids: list[int] = []
        mask: list[bool] = []
        for part, tokens in zip(parts, encoded, strict=True):
            found = self._spell(part.text) if part.spelled else tokens.ids
            ids += found
            mask += [part.learned] * len(found)
        return np.array(ids, dtype=np.uint16), np.array(mask, dtype=bool)
