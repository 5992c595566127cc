class Platform:
    device_name = ""

    @classmethod
    def get_device_communicator_cls(cls) -> str:
        return "vllm.distributed.device_communicators.base_device_communicator.DeviceCommunicatorBase"

    @classmethod
    def get_pass_manager_cls(cls) -> str:
        return "vllm.compilation.passes.pass_manager.PostGradPassManager"

    @classmethod
    def use_custom_op_collectives(cls) -> bool:
        return False
