class BaseRunner:
    def __init__(self, model_runner) -> None:
        self.model_runner = model_runner

    def _pre_initialize_flashinfer_allreduce_workspace(self):
        from sglang.srt.layers.flashinfer_comm_fusion import pre_initialize_workspaces

        mr = self.model_runner
        pre_initialize_workspaces(max_token_num=2048, hidden_dim=mr.model_config.hidden_size, dtype=mr.dtype)
