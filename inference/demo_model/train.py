"""Trains the demo model with mlx, on Metal, CUDA or a CPU: `python -m inference.demo_model.train --out DIR`.

Writes a folder that `mlx_lm.load` reads. Never imports Django.
"""

import argparse
import json
import logging
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
from mlx import nn
from mlx.utils import tree_flatten, tree_map, tree_unflatten
from mlx_lm.models.qwen3 import Model, ModelArgs
from tokenizers import Tokenizer

from .batches import BatchSource
from .chat import END_OF_TEXT, TURN_END
from .tokenizer import save_tokenizer, train_tokenizer

logger = logging.getLogger("demo_model.train")

Step = Callable[..., tuple[Any, Any, mx.array]]


def model_config(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the model's config.json."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": 256,
        "intermediate_size": 448,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 32,
        "vocab_size": tokenizer.get_vocab_size(),
        "max_position_embeddings": 8192,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "use_cache": True,
        "use_sliding_window": False,
        "bos_token_id": None,
        "eos_token_id": tokenizer.token_to_id(TURN_END),
        "pad_token_id": tokenizer.token_to_id(END_OF_TEXT),
        "torch_dtype": "float16",
    }


def learning_rate(progress: float, step: int, peak: float) -> float:
    """Return the rate: a short warm-up, then a cosine down to one hundredth; `progress` runs from 0 to 1."""
    warm = min(1.0, (step + 1) / 200)
    return peak * warm * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))))


def make_step(model: Model, optimizer: optim.Optimizer, dtype: mx.Dtype) -> Step:
    """Return the compiled training step: (parameters, optimizer state, ids, mask) to the new ones and the loss."""

    def loss_of(parameters: Any, ids: mx.array, mask: mx.array) -> mx.array:
        model.update(tree_map(lambda p: p.astype(dtype), parameters))
        logits = model(ids[:, :-1]).astype(mx.float32)
        wanted = mask[:, 1:].astype(mx.float32)
        return (nn.losses.cross_entropy(logits, ids[:, 1:]) * wanted).sum() / wanted.sum()

    gradient = mx.value_and_grad(loss_of)

    def step(parameters: Any, state: Any, ids: mx.array, mask: mx.array) -> tuple[Any, Any, mx.array]:
        optimizer.state = state
        loss, grads = gradient(parameters, ids, mask)
        grads, _ = optim.clip_grad_norm(grads, 1.0)
        return optimizer.apply_gradients(grads, parameters), optimizer.state, loss

    return mx.compile(step)


def save(parameters: Any, config: dict[str, Any], tokenizer: Tokenizer, folder: Path) -> None:
    """Write the model folder, the weights as float16."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: value.astype(mx.float16) for name, value in tree_flatten(parameters)}
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    generation = {"do_sample": False, "eos_token_id": config["eos_token_id"], "pad_token_id": config["pad_token_id"]}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")
    save_tokenizer(tokenizer, folder, config["max_position_embeddings"])


def start(arguments: argparse.Namespace) -> tuple[Tokenizer, dict[str, Any], Model]:
    """Make the tokenizer and the model, new or from an earlier run."""
    if arguments.resume:
        tokenizer = Tokenizer.from_file(str(arguments.resume / "tokenizer.json"))
    else:
        tokenizer = train_tokenizer(arguments.seed, arguments.vocabulary)
    config = model_config(tokenizer)
    model = Model(ModelArgs.from_dict(config))
    if arguments.resume:
        weights = mx.load(str(arguments.resume / "model.safetensors"))
        model.update(tree_unflatten([(name, value.astype(mx.float32)) for name, value in weights.items()]))
    mx.eval(model.parameters())
    return tokenizer, config, model


def train(arguments: argparse.Namespace) -> None:
    """Train and save, saying how far it is."""
    began = time.monotonic()
    mx.random.seed(arguments.seed)
    tokenizer, config, model = start(arguments)
    device = mx.default_device()
    on_gpu = device.type == mx.DeviceType.gpu
    parameters = model.trainable_parameters()
    count = sum(value.size for _, value in tree_flatten(parameters))
    logger.info("device %s, %d parameters, vocabulary %d", device, count, config["vocab_size"])
    optimizer = optim.AdamW(learning_rate=arguments.rate, betas=[0.9, 0.95], weight_decay=0.05)
    optimizer.init(parameters)
    step_function = make_step(model, optimizer, mx.bfloat16 if on_gpu else mx.float32)
    source = BatchSource(tokenizer, arguments.seed + arguments.shift, arguments.batch_tokens, arguments.writers)
    state: Any = optimizer.state
    seconds = arguments.minutes * 60 if arguments.minutes else math.inf
    first = said = time.monotonic()
    tokens = step = 0
    total = mx.array(0.0)
    recent = 0
    while step < arguments.steps and time.monotonic() - first < seconds:
        ids, mask = source.next()
        progress = max(step / arguments.steps, (time.monotonic() - first) / seconds)
        state["learning_rate"] = mx.array(learning_rate(progress, step, arguments.rate))
        parameters, state, loss = step_function(parameters, state, mx.array(ids).astype(mx.int32), mx.array(mask))
        total = total + loss
        mx.async_eval(parameters, state, total)
        tokens += ids.size
        step += 1
        recent += 1
        if step == 1:
            mx.eval(total)
            logger.info("the first step took %.0f s, most of it to compile", time.monotonic() - first)
            first = said = time.monotonic()
        elif step % 10 == 0:
            mx.eval(total)
        if time.monotonic() - said > arguments.report:
            said = time.monotonic()
            logger.info("step %d, loss %.4f, %.0f tokens/s, %.0f s, batches used again %d", step, total.item() / recent,
                        tokens / (said - first), said - first, source.repeated)  # fmt: skip
            total, recent = mx.array(0.0), 0
    mx.eval(parameters)
    source.close()
    save(parameters, config, tokenizer, arguments.out)
    logger.info("%d steps, %d tokens, %.0f s in all, saved", step, tokens, time.monotonic() - began)


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(prog="python -m inference.demo_model.train", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to write the model to")
    parser.add_argument("--steps", type=int, default=12_000)
    parser.add_argument("--minutes", type=float, default=0, help="stop after this many minutes of training, if sooner")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--shift", type=int, default=0, help="added to the seed of the text, for a resumed run")
    parser.add_argument("--vocabulary", type=int, default=1280)
    parser.add_argument("--batch-tokens", type=int, default=32_768)
    parser.add_argument("--rate", type=float, default=2e-3, help="highest learning rate")
    writers = max(1, (os.cpu_count() or 2) - 1)
    parser.add_argument("--writers", type=int, default=writers, help="processes that write text")
    parser.add_argument("--report", type=float, default=10, help="seconds between two lines of progress")
    parser.add_argument("--resume", type=Path, help="go on from this model folder")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    train(arguments)


if __name__ == "__main__":
    main()
