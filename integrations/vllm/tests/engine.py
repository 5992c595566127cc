"""Run vLLM's engine on CPUs with two tensor-parallel workers, and write what it generated.

    python engine.py MODEL RESULT.json

MODEL is a folder; if it doesn't exist, it gets a tiny Llama with random weights.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from vllm import LLM, SamplingParams

PROMPTS: Any = [{"prompt_token_ids": [(11 * i + 5 * k) % 480 + 8 for k in range(4 + 5 * i)]} for i in range(4)]
STEPS = 128


def make_model(folder: Path) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=512,
        max_position_embeddings=1024,
        initializer_range=0.2,  # so that greedy tokens differ from step to step
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def generate(llm: LLM, steps: int) -> list[list[int]]:
    parameters = SamplingParams(temperature=0, max_tokens=steps, ignore_eos=True, detokenize=False)
    return [[*output.outputs[0].token_ids] for output in llm.generate(PROMPTS, parameters, use_tqdm=False)]


def main() -> None:
    model, result = Path(sys.argv[1]), Path(sys.argv[2])
    if not model.exists():
        make_model(model)
    llm = LLM(
        str(model),
        tensor_parallel_size=2,
        distributed_executor_backend="mp",
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        max_model_len=512,
        max_num_seqs=8,
        seed=0,
        worker_extension_cls="engine_worker.Counts",
    )
    tokens = generate(llm, STEPS)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        generate(llm, STEPS)
        seconds.append(time.perf_counter() - start)
    workers = llm.collective_rpc("describe_tensor_parallel")
    result.write_text(
        json.dumps(
            {"tokens": tokens, "tokens_per_s": round(len(PROMPTS) * STEPS / min(seconds), 1), "workers": workers}
        )
    )


if __name__ == "__main__":
    main()
