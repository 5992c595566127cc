#!/usr/bin/env python3
"""Tokens a second of an untouched transformers model in tensor parallelism, by the backend of torch.distributed.

    python benchmarks/transformers_tp.py MODEL --make                       # a folder with a Llama of random weights
    torchrun --nproc-per-node 2 benchmarks/transformers_tp.py MODEL --backend nccl
    torchrun --nproc-per-node 2 benchmarks/transformers_tp.py MODEL --backend cpu:gloo,cuda:comm

Loads the model with `tp_plan="auto"`, and decodes greedily after a prompt, in three ways: eager; as a CUDA graph of a
step; compiled, with torch's own CUDA graphs. Prints JSON: the best of five runs, and the first tokens.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import transformers

PROMPT, STEPS, RUNS = 32, 64, 5


def make(folder: str) -> None:
    """Write a Llama of 16 layers as wide as an 8B's."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=2048,
    )
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        transformers.LlamaForCausalLM(config).save_pretrained(folder)


class Decoder:
    """Decodes a batch greedily, in one of three ways.

    Args:
        model: the model, on this rank's GPU.
        batch: the number of sequences.
        way: "eager", "graph" or "compiled".
    """

    def __init__(self, model: Any, batch: int, way: str) -> None:
        self._model = model
        self._prompt = (torch.arange(batch * PROMPT, device="cuda").view(batch, PROMPT) * 7) % 31000 + 3
        self._cache = transformers.StaticCache(model.config, max_cache_len=2 * (PROMPT + STEPS))
        self._token = self._forward(self._prompt, torch.arange(PROMPT, device="cuda"))
        self._place = torch.tensor([PROMPT], device="cuda")
        self._step: Callable[[], torch.Tensor] = {
            "eager": lambda: self._next,
            "graph": self._graph,
            "compiled": self._compiled,
        }[way]()

    def _forward(self, tokens: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        positions = places[None].expand(len(tokens), -1)
        logits = self._model(tokens, past_key_values=self._cache, position_ids=positions, use_cache=True).logits
        return logits[:, -1].argmax(-1, keepdim=True)

    def _next(self) -> torch.Tensor:
        return self._forward(self._token, self._place)

    def _graph(self) -> Callable[[], torch.Tensor]:
        capture: Any = contextlib.nullcontext()
        if dist.get_backend() != "nccl":
            import comm_core as comm

            shape = (len(self._prompt), self._model.config.hidden_size)
            comm.pre_capture_init(max_tokens=shape[0], hidden_size=shape[1], dtype=torch.bfloat16)
            capture = comm.capture()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self._next()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with capture, torch.cuda.graph(graph):
            token = self._next()

        def step() -> torch.Tensor:
            graph.replay()
            return token

        return step

    def _compiled(self) -> Callable[[], torch.Tensor]:
        forward = torch.compile(self._forward, mode="reduce-overhead")

        def step() -> torch.Tensor:
            torch.compiler.cudagraph_mark_step_begin()
            return forward(self._token, self._place).clone()

        return step

    def decode(self) -> tuple[list[int], float]:
        """Return the first sequence's tokens, and the seconds that the steps took."""
        self._cache.reset()
        self._token.copy_(self._forward(self._prompt, torch.arange(PROMPT, device="cuda")))
        self._place.fill_(PROMPT)
        tokens = []
        dist.barrier()
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(STEPS):
            token = self._step()
            tokens.append(token[0, 0].clone())
            self._token.copy_(token)
            self._place.add_(1)
        torch.cuda.synchronize()
        return torch.stack(tokens).tolist(), time.perf_counter() - start


@torch.no_grad()
def measure(folder: str, backend: str) -> None:
    """Decode in each way, and print what it took."""
    rank = int(os.environ["LOCAL_RANK"])
    torch.cuda.set_device(rank)
    dist.init_process_group(backend)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, tp_plan="auto").eval()
    found: dict[str, Any] = {"backend": backend, "torch": torch.__version__, "transformers": transformers.__version__}
    for way, batch in (("eager", 1), ("eager", 32), ("graph", 1), ("graph", 32), ("compiled", 1)):
        decoder = Decoder(model, batch, way)
        decoder.decode()
        runs = [decoder.decode() for _ in range(RUNS)]
        slowest = torch.tensor(min(seconds for _, seconds in runs), device="cuda")
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        speed = batch * STEPS / slowest.item()
        found[f"{way}, batch {batch}"] = {"tokens_per_s": round(speed, 1), "tokens": runs[0][0][:12]}
        # NCCL's communicators can't end before the graphs that have their calls.
        del decoder
        torch.compiler.reset()
        gc.collect()
    if dist.get_rank() == 0:
        sys.stdout.write(json.dumps(found, indent=1) + "\n")
    dist.destroy_process_group()


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="the model's folder")
    parser.add_argument("--make", action="store_true", help="write the model, and measure nothing")
    parser.add_argument("--backend", default="nccl", help="for init_process_group")
    args = parser.parse_args()
    make(args.model) if args.make else measure(args.model, args.backend)


if __name__ == "__main__":
    main()
