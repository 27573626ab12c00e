"""A model with random weights in the shape of a small Qwen3: about 29 million parameters, float32.

It says nothing, at the cost of a model that does. Its tokenizer is a byte-level BPE over made-up words in which every
token is visible ASCII text, so that each generated token can be seen on the wire. Same seed, same files.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

VOCABULARY = 8192
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CONFIG: dict[str, object] = {
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "hidden_size": 512,
    "num_hidden_layers": 8,
    "intermediate_size": 1536,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 8192,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_SEED = 7


def made_up_words(count: int, rng: random.Random) -> Iterator[str]:
    """Yield pronounceable words that mean nothing."""
    for _ in range(count):
        yield "".join(rng.choice("bcdfghjklmnpqrstvwz") + rng.choice("aeiouy") for _ in range(rng.randint(1, 4)))


def write_tokenizer(folder: Path) -> int:
    """Write the tokenizer's files and return the size of its vocabulary."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    ascii_bytes = [chr(code) for code in range(33, 127)] + ["Ġ", "Ċ"]  # byte-level BPE's letters for blank and newline
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=list(SPECIAL_TOKENS), initial_alphabet=ascii_bytes, show_progress=False
    )
    rng = random.Random(_SEED)
    texts = [" ".join(made_up_words(50, rng)) for _ in range(2000)]
    tokenizer.train_from_iterator([*texts, "system\nuser\nassistant\n"], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "model_max_length": CONFIG["max_position_embeddings"],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return int(tokenizer.get_vocab_size())


def write_model(folder: Path) -> None:
    """Write a complete model into a folder. Imports mlx."""
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.models import qwen3

    folder.mkdir(parents=True, exist_ok=True)
    config = CONFIG | {"vocab_size": write_tokenizer(folder), "eos_token_id": len(SPECIAL_TOKENS) - 1}
    mx.random.seed(_SEED)
    model = qwen3.Model(qwen3.ModelArgs.from_dict(config))
    weights = {name: value.astype(mx.float32) for name, value in tree_flatten(model.parameters())}
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(config))
