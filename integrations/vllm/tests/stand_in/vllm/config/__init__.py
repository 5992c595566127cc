from vllm.config.vllm import VllmConfig, get_current_vllm_config_or_none, set_current_vllm_config

__all__ = ["VllmConfig", "get_current_vllm_config_or_none", "set_current_vllm_config"]
