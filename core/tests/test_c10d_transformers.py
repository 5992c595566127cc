"""transformers on the backend "comm": an untouched model with `tp_plan="auto"`; needs transformers installed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
import torch.distributed as dist
from c10d_ranks import Counting

if TYPE_CHECKING:
    from harness import Ranks

pytest.importorskip("transformers", reason="transformers isn't installed: pip install transformers")

TOKENS, LAYERS = 16, 4


def generate(folder: str) -> tuple[list[int], int]:
    """The tokens that the model generates, and the sums that the group's handle served."""
    from transformers import AutoModelForCausalLM

    counting = Counting() if dist.get_backend() == "comm" else None
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, tp_plan="auto").eval()
    prompt = torch.tensor([[(7 * place) % 500 + 3 for place in range(9)]])
    with torch.no_grad():
        found = model.generate(
            prompt, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False, pad_token_id=0, eos_token_id=None
        )
    return found[0, prompt.shape[1] :].tolist(), 0 if counting is None else counting.served


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a tiny Llama of random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    folder = tmp_path_factory.mktemp("model")
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


def test_tokens_equal_those_of_gloo_and_every_sum_is_served(ranks: Ranks, model: str) -> None:
    places = [{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"} for rank in range(2)]
    found = {
        backend: ranks.run(generate, model, backend=backend, installed=True, env=places, deadline_s=240)
        for backend in ("gloo", "comm")
    }
    tokens = found["gloo"][0][0]
    assert len(tokens) == TOKENS
    assert len(set(tokens)) > 1
    for ours, served in found["comm"]:
        assert ours == tokens
        # Two sums a layer: after attention, and after the MLP. Newer releases also split the embedding's table.
        assert served in (2 * LAYERS * TOKENS, (2 * LAYERS + 1) * TOKENS)
