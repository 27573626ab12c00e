"""The load test: `python -m benchmarks.load`, or `make bench`.

Starts the product on folders and a port of its own and measures it with streaming clients; runs the same work (the same
token ids, greedy, the same number of tokens and rows, float32, the same BLAS) on mlx-lm's batch generator and on the
product's engine, both without a server; and prints all three with their ratios. The three take turns, in an order that
changes, after a warm-up. README.md says what the numbers mean.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import msgspec

from inference.protocol import ModelInfo

from . import environment, interference, site, stats, table
from .direct import RANDOM_29M
from .random_model import made_up_words
from .records import ClientJob, Generate, MakePrompts, Measured, Prompt

PRODUCT, RAW, ENGINE = "product", "mlx-lm", "engine"
WARM_UP_TOKENS = 16
QUIET = 0.1
"""Share of the machine that others may use before a number is doubtful."""

T = TypeVar("T")


class Helper:
    """A process that answers JSON lines with JSON lines."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    @classmethod
    @contextlib.contextmanager
    def running(cls, module: str, *arguments: str) -> Iterator[Helper]:
        """Run a module of this package for the length of a block."""
        command = [sys.executable, "-m", f"benchmarks.{module}", *arguments]
        process = subprocess.Popen(command, cwd=site.ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        helper = cls(process)
        try:
            yield helper
        finally:
            assert process.stdin is not None
            process.stdin.close()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def read(self, kind: type[T]) -> T:
        """Return the next line as this type."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"a helper process ended with status {self._process.wait()}")
        return msgspec.json.decode(line, type=kind)

    def ask(self, question: msgspec.Struct, kind: type[T]) -> T:
        """Send a line and return the answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(msgspec.json.encode(question) + b"\n")
        self._process.stdin.flush()
        return self.read(kind)


@dataclass(frozen=True, slots=True)
class Run:
    """One arm at one width, once.

    Attributes:
        cpu: CPU seconds per second of the run, by process.
        others: share of the machine that processes outside this benchmark used.
    """

    summary: stats.Summary
    cpu: dict[str, float]
    measured: Measured
    others: float = 0.0

    @classmethod
    def of(cls, measured: Measured, cpu_s: dict[str, float]) -> Run:
        """Return the run's numbers."""
        summary = stats.summarise(measured.traces)
        wall_s = summary.wall_s or 1.0
        return cls(summary, {name: used / wall_s for name, used in cpu_s.items()}, measured)


Arm = Callable[[list[Prompt], int, int], Run]
"""Runs prompts, at most so many at once, for so many tokens each."""


def product_arm(client: Helper, options: argparse.Namespace, where: site.Site | None) -> Arm:
    """Return the arm that goes through the web server."""
    url = options.url or (where.url if where else "")
    model = options.model if options.url else site.MODEL

    def run(prompts: list[Prompt], clients: int, max_tokens: int) -> Run:
        before = where.cpu_s() if where else {}
        job = ClientJob(url, options.transport, model, [prompt.text for prompt in prompts], clients, max_tokens)
        measured = client.ask(job, Measured)
        after = where.cpu_s() if where else {}
        cpu_s = {name: after[name] - before[name] for name in before} | {"client": measured.cpu_s}
        return Run.of(measured, cpu_s)

    return run


def direct_arm(direct: Helper, engine: str, options: argparse.Namespace) -> Arm:
    """Return the arm that runs without a server."""

    def run(prompts: list[Prompt], clients: int, max_tokens: int) -> Run:
        ids = [prompt.ids for prompt in prompts]
        task = Generate(engine, ids, clients, max_tokens, options.rows, options.prefill_tokens_per_step)
        measured = direct.ask(task, Measured)
        return Run.of(measured, {"worker": measured.cpu_s})

    return run


def measure(
    arms: dict[str, Arm],
    prompts_for: Callable[[int, int], list[Prompt]],
    widths: Sequence[int],
    options: argparse.Namespace,
) -> dict[int, dict[str, list[Run]]]:
    """Warm up, then run every arm at every width `repeats` times, in turn."""
    seed = 1
    for arm in arms.values():
        arm(prompts_for(max(widths), 0), max(widths), WARM_UP_TOKENS)
    results: dict[int, dict[str, list[Run]]] = {}
    for clients in widths:
        count = options.requests or max(2 * clients, 4)
        runs: dict[str, list[Run]] = {name: [] for name in arms}
        for repeat in range(options.repeats):
            prompts = prompts_for(count, seed)
            seed += 1
            order = list(arms) if repeat % 2 == 0 else list(reversed(arms))
            for name in order:
                if options.quiet_wait:
                    interference.wait_until_quiet(QUIET, options.quiet_wait)
                watch = interference.Watch()
                run = arms[name](prompts, clients, options.max_tokens)
                run = dataclasses.replace(run, others=watch.others())
                runs[name].append(run)
                speed = f"{table.number(run.summary.tokens_per_s)} tokens/s, {run.summary.errors} errors"
                if run.others > QUIET:
                    speed += f" (other processes used {run.others * 100:.0f}% of the machine)"
                say(f"{clients:4} clients, run {repeat + 1} of {options.repeats}: {name:8} {speed}")
        results[clients] = runs
    return results


def say(text: str) -> None:
    """Print progress, apart from the results."""
    print(text, file=sys.stderr, flush=True)


def medians(runs: Sequence[Run], base: Sequence[Run] | None) -> dict[str, Any]:
    """Return what one arm measured at one width, as it stands in the JSON file."""
    summary = stats.median_summary([run.summary for run in runs])
    speeds = [run.summary.tokens_per_s for run in runs]
    values = dataclasses.asdict(summary)
    values["tokens_per_s_of_runs"] = speeds
    values["cpu"] = {name: median(run.cpu[name] for run in runs) for name in runs[0].cpu}
    values["cpu_ms_per_token"] = {
        name: median(run.cpu[name] * run.summary.wall_s / max(run.summary.tokens, 1) * 1000 for run in runs)
        for name in runs[0].cpu
    }
    values["others"] = median(run.others for run in runs)
    values["first_error"] = next((t.error for run in runs for t in run.measured.traces if t.error), "")
    if base is not None:
        values["ratio_to_mlx_lm"] = stats.median_ratio(speeds, [run.summary.tokens_per_s for run in base])
        shares = [stats.same_texts(a.measured.traces, b.measured.traces) for a, b in zip(runs, base, strict=True)]
        values["same_text_as_mlx_lm"] = median(shares)
    return values


def report(results: dict[int, dict[str, list[Run]]]) -> tuple[str, list[dict[str, Any]]]:
    """Return the table for the terminal and the rows for the JSON file."""
    head = [
        "clients",
        "what",
        "tokens/s",
        "/ mlx-lm",
        "TTFT ms 50 / 95 / 99",
        "ITL ms 50 / 95 / 99",
        "errors",
        "same text",
    ]
    head += ["CPU worker", "web", "client", "others", "CPU ms/token"]
    lines, rows = [], []
    for clients, arms in results.items():
        for name, runs in arms.items():
            values = medians(runs, arms.get(RAW))
            rows.append({"clients": clients, "what": name, **values})
            ttft, itl, cpu = values["ttft"], values["itl"], values["cpu"]
            lines.append(
                [
                    str(clients),
                    name,
                    table.number(values["tokens_per_s"]),
                    table.number(values["ratio_to_mlx_lm"]) if RAW in arms else "-",
                    " / ".join(table.number(ttft[key]) for key in ("p50", "p95", "p99")),
                    " / ".join(table.number(itl[key]) for key in ("p50", "p95", "p99")),
                    str(values["errors"]),
                    f"{values['same_text_as_mlx_lm'] * 100:.0f}%" if RAW in arms else "-",
                    *(f"{cpu[key] * 100:.0f}%" if key in cpu else "-" for key in ("worker", "web", "client")),
                    f"{values['others'] * 100:.0f}%",
                    table.number(sum(values["cpu_ms_per_token"].values())),
                ]
            )
    return table.render(head, lines), rows


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.load", description=(__doc__ or "").split("\n\n")[1])
    parser.add_argument("--clients", default="1,8,32", help="requests in flight, several after commas")
    parser.add_argument("--requests", type=int, default=0, help="requests of a run; 0 takes two for each client")
    parser.add_argument("--prompt-tokens", type=int, default=200)
    parser.add_argument(
        "--shared-tokens", type=int, default=0, help="of the prompt's tokens, how many are the same in every prompt"
    )
    parser.add_argument("--max-tokens", type=int, default=64, help="tokens that every request generates")
    parser.add_argument("--server", choices=("daphne", "uvicorn"), default="daphne")
    parser.add_argument("--transport", choices=("sse", "ws"), default="sse")
    parser.add_argument("--model", default="demo", help=f"demo, {RANDOM_29M}, a folder, or with --url a served name")
    parser.add_argument("--url", default="", help="measure this running site alone, such as http://127.0.0.1:8000")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rows", type=int, default=32, help="most sequences in a batch")
    parser.add_argument("--prefill-tokens-per-step", type=int, default=0, help="0 leaves the engine's default")
    parser.add_argument("--only", default="", help=f"some of {PRODUCT}, {RAW} and {ENGINE}, after commas")
    parser.add_argument(
        "--quiet-wait", type=float, default=20.0, help="longest wait in seconds, before a run, for a busy machine"
    )
    parser.add_argument("--json", type=Path, help="write the results to this file too")
    options = parser.parse_args(arguments)
    if options.url and options.shared_tokens:
        parser.error("--shared-tokens needs the model's tokenizer, which a site at --url does not give away")
    return options


def plain_prompts(tokens: int, count: int, seed: int) -> list[Prompt]:
    """Return prompts for a site whose tokenizer is not known: about a token for each two letters."""
    import random

    rng = random.Random(f"{time.time_ns()}:{seed}")
    texts = (" ".join(made_up_words(tokens, rng)) for _ in range(count))
    return [Prompt(text[: tokens * 2]) for text in texts]


def main() -> int:
    """Measure, print, and return the exit status: 1 when a request failed."""
    options = parse()
    # An ordinary SIGTERM would leave the site's processes and folders behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    widths = [int(width) for width in options.clients.split(",")]
    facts = environment.facts(site.ROOT)
    names = options.only.split(",") if options.only else [PRODUCT, RAW, ENGINE]
    info: ModelInfo | None = None
    with contextlib.ExitStack() as stack:
        client = stack.enter_context(Helper.running("client"))
        if options.url:
            arms = {PRODUCT: product_arm(client, options, None)}

            def prompts_for(count: int, seed: int) -> list[Prompt]:
                return plain_prompts(options.prompt_tokens, count, seed)
        else:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mlxb-")))
            source = model_source(options.model, folder)
            say("Loading the model ...")
            direct = stack.enter_context(Helper.running("direct", source, str(options.rows)))
            info = direct.read(ModelInfo)
            arms = {}
            if PRODUCT in names:
                say(f"Starting the site on {options.server} ...")
                where = stack.enter_context(
                    site.running(options.server, source, options.rows, options.prefill_tokens_per_step)
                )
                arms[PRODUCT] = product_arm(client, options, where)
            arms |= {
                name: direct_arm(direct, engine, options)
                for name, engine in ((RAW, "raw"), (ENGINE, "engine"))
                if name in names
            }

            def prompts_for(count: int, seed: int) -> list[Prompt]:
                wanted = MakePrompts(count, options.prompt_tokens, seed, options.shared_tokens)
                return direct.ask(wanted, list[Prompt])

        results = measure(arms, prompts_for, widths, options)
    text, rows = report(results)
    print(text)
    if info is not None:
        facts["model"] = {"parameters": info.parameters, "dtype": info.dtype, "device": info.device, "blas": info.blas}
    print("\n" + json.dumps(facts, indent=1))
    if options.json:
        settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
        options.json.write_text(json.dumps({"options": settings, "environment": facts, "results": rows}, indent=1))
    return 1 if any(row["errors"] for row in rows) else 0


def model_source(model: str, folder: Path) -> str:
    """Return the source that a worker loads for `--model`; a random model is written into `folder` by a helper."""
    if model == RANDOM_29M:
        command = [sys.executable, "-m", "benchmarks.direct", "--write-random", str(folder)]
        subprocess.run(command, cwd=site.ROOT, check=True)
        return str(folder)
    return str(Path(model).resolve()) if Path(model).is_dir() else model


if __name__ == "__main__":
    sys.exit(main())
