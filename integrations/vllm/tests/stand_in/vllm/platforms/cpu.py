from vllm.platforms.interface import Platform


class CpuPlatform(Platform):
    device_name: str = "cpu"

    @classmethod
    def get_device_communicator_cls(cls) -> str:
        return "vllm.distributed.device_communicators.cpu_communicator.CpuCommunicator"
