from sglang.srt.distributed.device_communicators.custom_all_reduce_v2 import CustomAllReduceV2


def dispatch_custom_allreduce(group: object, device: object):
    return CustomAllReduceV2
