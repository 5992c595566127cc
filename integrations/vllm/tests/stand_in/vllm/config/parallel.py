import dataclasses


@dataclasses.dataclass
class ParallelConfig:
    enable_elastic_ep: bool = False
