from vllm.platforms.interface import Platform


class CudaPlatformBase(Platform):
    device_name: str = "cuda"

    @classmethod
    def get_device_communicator_cls(cls) -> str:
        return "vllm.distributed.device_communicators.cuda_communicator.CudaCommunicator"

    @classmethod
    def use_custom_op_collectives(cls) -> bool:
        return True
