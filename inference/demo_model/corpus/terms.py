"""What the model knows about feature flags and about the words of the trade, with the ways to ask.

A flag has its spoken name, its environment variable, what it does, and what its being off means. `{f}` stands for a
flag, `{w}` for a word; the `UNSEEN` ways are for evaluation only.
"""

FLAGS = {
    "request_deduplication": (
        "request deduplication", "MLX_REQUEST_DEDUP_ENABLED", "answers an identical request with the result of a moment ago",
        "a request that finished a moment ago is run again",
    ),
    "prompt_cache": (
        "prompt cache", "MLX_PROMPT_CACHE_ENABLED", "stores finished completions and replays them for equal requests",
        "no completions are stored",
    ),
    "request_coalescing": (
        "request coalescing", "MLX_REQUEST_COALESCING_ENABLED", "lets identical requests in flight share one inference",
        "each request runs its own inference",
    ),
    "prefix_cache": (
        "prefix cache", "MLX_PREFIX_CACHE_ENABLED", "reuses the KV cache of prompts that begin alike",
        "every prompt is computed from its first token",
    ),
    "multi_worker": (
        "multi worker", "MLX_MULTI_WORKER_ENABLED", "runs several workers for one model",
        "there is one worker for each model",
    ),
    "adaptive_batching": (
        "adaptive batching", "MLX_ADAPTIVE_BATCHING_ENABLED", "adapts the number of rows in the batch to the step time",
        "the row limit is fixed",
    ),
    "generation_retry": (
        "generation retry", "MLX_GENERATION_RETRY_ENABLED", "runs a request again after a failure of a worker",
        "the first failure is final",
    ),
    "connection_pool": (
        "connection pool", "MLX_CONNECTION_POOL_ENABLED", "keeps connections to the workers open",
        "each request opens a fresh connection",
    ),
    "optimized_streaming": (
        "optimized streaming", "MLX_OPTIMIZED_STREAMING_ENABLED", "merges deltas for a reader that lags",
        "each delta is written at once, as its own chunk",
    ),
    "memory_policy": (
        "memory policy", "MLX_MEMORY_POLICY_ENABLED", "unloads idle models and prefetches the next one",
        "there is no idle unload and no prefetch",
    ),
}  # fmt: skip
FLAG_DOES = (
    "What does {f} do?", "What is {f}?", "Explain {f}.", "What does the flag {f} do?", "What is {f} for?", "{f}?",
    "Tell me about {f}.", "Describe the flag {f}.", "What is the {f} flag?", "What does the feature {f} do?",
    "What is the flag {f} for?", "What is the purpose of {f}?", "What does the {f} flag control?", "Describe {f}.",
)  # fmt: skip
FLAG_DOES_UNSEEN = ("Please explain the flag {f}.", "What will {f} do?")
FLAG_OFF = (
    "What happens when {f} is off?", "What does {f} mean when it is off?", "What if {f} is off?", "{f} off?",
    "What happens without {f}?", "What happens if I turn off {f}?", "What changes when I turn {f} off?",
    "What is different when {f} is disabled?", "If {f} is off, what happens?", "What if I disable {f}?",
    "What does it mean that {f} is off?", "What happens when the flag {f} is off?", "I turned off {f}. What happens?",
)  # fmt: skip
FLAG_OFF_UNSEEN = ("What happens if {f} is disabled?", "What is the effect when {f} is off?")
FLAG_ENV = (
    "Which environment variable sets {f}?", "What is the environment variable of {f}?", "{f} environment variable?",
    "Which variable controls {f}?", "How do I turn off {f} with an environment variable?", "{f} env",
    "Which environment variable belongs to {f}?", "How do I set {f} in the environment?",
    "What is the variable for {f}?", "Name the environment variable of {f}.", "Which env variable turns {f} off?",
    "Which environment variable is for the flag {f}?",
)  # fmt: skip
FLAG_ENV_UNSEEN = ("Which environment variable controls {f}?", "What environment variable does {f} have?")

WORDS = {
    "TTFT": "TTFT is the time to first token.",
    "ITL": "ITL is the inter-token latency, the time between two tokens.",
    "prefill": "Prefill is the computation of the prompt before the first token.",
    "decode": "Decode writes one token per step.",
    "KV cache": "The KV cache holds the keys and values of the tokens seen so far.",
    "continuous batching": "Continuous batching lets requests join and leave the running batch at every step.",
    "a row": "A row is a sequence in the batch.",
    "drain": "Drain means to finish the running requests and take no new ones.",
    "a fingerprint": "A fingerprint is the hash that identifies equal requests.",
    "a worker": "A worker is a process that runs one model.",
    "a delta": "A delta is a new piece of text in a stream.",
    "a token": "A token is a piece of text, the unit that a model reads and writes.",
    "Django": "Django is a web framework for Python.",
    "MLX": "MLX is Apple's array framework for machine learning.",
    "daphne": "daphne is the ASGI server that serves the site.",
    "Prometheus": "Prometheus is a system that collects metrics.",
    "a language model": "A language model is a program that continues text, one token at a time.",
    "a step": "A step is one pass of the model over the batch.",
}
WORD_ASKS = (
    "What is {w}?", "What does {w} mean?", "Explain {w}.", "Define {w}.", "What is the meaning of {w}?", "{w}?",
    "Tell me what {w} is.", "What do you mean by {w}?", "What is meant by {w}?", "Describe {w}.", "Explain the word {w}.",
    "What is the definition of {w}?", "What does the word {w} mean?", "Tell me the meaning of {w}.",
)  # fmt: skip
WORD_ASKS_UNSEEN = ("Can you explain {w}?", "Please define {w}.")
