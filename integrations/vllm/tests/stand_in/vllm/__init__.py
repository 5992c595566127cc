"""A small package with the names of vLLM that comm_vllm imports; test_vllm_contract.py compares its signatures."""

from vllm._version import __version__

__all__ = ["__version__"]
