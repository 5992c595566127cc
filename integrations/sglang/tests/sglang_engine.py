"""Run SGLang's engine on CPUs with two tensor-parallel ranks, and write what it generated.

    python sglang_engine.py MODEL RESULT.json

MODEL is a folder; if it doesn't exist, it gets a tiny Llama with random weights.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

PROMPTS = [[(11 * i + 5 * k) % 480 + 8 for k in range(4 + 5 * i)] for i in range(4)]
STEPS = 64
PARAMETERS = {"temperature": 0, "max_new_tokens": STEPS, "ignore_eos": True}


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
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def main() -> None:
    model, result = Path(sys.argv[1]), Path(sys.argv[2])
    if not model.exists():
        make_model(model)
    import sglang

    engine = sglang.Engine(
        model_path=str(model),
        device="cpu",
        tp_size=2,
        attention_backend="torch_native",
        sampling_backend="pytorch",
        grammar_backend="none",
        skip_tokenizer_init=True,
        dtype="bfloat16",
        disable_cuda_graph=True,
        disable_radix_cache=True,
        disable_overlap_schedule=True,
        mem_fraction_static=0.1,
        max_total_tokens=4096,
        context_length=512,
        random_seed=0,
        log_level="info",
    )
    tokens = [one["output_ids"] for one in engine.generate(input_ids=PROMPTS, sampling_params=PARAMETERS)]
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        engine.generate(input_ids=PROMPTS, sampling_params=PARAMETERS)
        seconds.append(time.perf_counter() - start)
    result.write_text(json.dumps({"tokens": tokens, "tokens_per_s": round(len(PROMPTS) * STEPS / min(seconds), 1)}))
    engine.shutdown()


if __name__ == "__main__":
    main()
