"""GPUs of a job, and what is assumed of them to estimate times."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Machine:
    """The GPUs of a job and what is assumed of them; none of it was measured by this project.

    `gemm_efficiency` is the share of `peak_tflops` that GEMMs and attention reach, 650 TFLOP/s of
    an H100; `hbm_efficiency` the share of `hbm` GB/s that elementwise kernels reach, 2.8 TB/s.
    `fp8_speedup` is how much faster the decoder's GEMMs are in FP8, casts included;
    `overlap_efficiency` the share of tensor-parallel communication that `parallel.tensor_overlap`
    hides. `intra_node` and `inter_node` are GB/s that a GPU sends at to GPUs of its node and,
    through its network card, of other nodes. `reserve_gib` of the memory is for CUDA, NCCL and what
    the allocator cannot use. `mfu` is the share of the peak that `Plan.days` takes for granted, and
    nothing else.
    """

    gpus: int
    memory_gib: float
    gpus_per_node: int = 8
    reserve_gib: float = 4.0
    peak_tflops: float = 989.0  # in bf16, dense: NVIDIA's data sheet of the H100 SXM
    mfu: float = 0.4
    gemm_efficiency: float = 0.66
    fp8_speedup: float = 1.6
    hbm: float = 3350.0  # the same data sheet
    hbm_efficiency: float = 0.84
    intra_node: float = 300.0
    inter_node: float = 40.0
    overlap_efficiency: float = 0.75

    @property
    def usable(self) -> int:
        """Bytes of a GPU's memory that the run may take."""
        return int((self.memory_gib - self.reserve_gib) * 2**30)

    def computing(self, operations: float) -> float:
        """Seconds that one GPU takes for operations of GEMMs and attention in bf16."""
        return operations / (self.peak_tflops * 1e12 * self.gemm_efficiency)

    def moving(self, size: float) -> float:
        """Seconds that elementwise kernels take to read and write `size` bytes of its memory."""
        return size / (1e9 * self.hbm * self.hbm_efficiency)

    def sending(self, size: float, extent: int, stride: int = 1) -> float:
        """Seconds in which every rank of a group sends `size` bytes around a ring.

        The group is every `stride`-th of `extent` ranks in a row. NCCL's rings leave a node through
        the network cards of all GPUs that the group has there.
        """
        if extent <= self.gpus_per_node:
            return size / (1e9 * self.intra_node)
        cards = max(1, self.gpus_per_node // stride)
        return size / (1e9 * min(self.intra_node, cards * self.inter_node))
