"""What there is to compute with: the memory and the speed of known GPUs, and of this machine.

GPUS["h100"].memory                    # bytes
this_gpu(name, memory).speed           # by what torch calls it
"""

import os
from pathlib import Path
from typing import NamedTuple

GIB = 2**30
WITHOUT_BF16 = ("v100", "t4")


class Speed(NamedTuple):
    """A second's worth of a device."""

    half: float  # matrix products in bf16 and fp16, dense: operations
    single: float  # in fp32, without TF32, which torch does not use by itself
    memory: float  # bytes
    link: float  # bytes to another device of the node, in one direction

    def peak(self, dtype: str) -> float:
        return self.single if dtype == "fp32" else self.half


class Device(NamedTuple):
    """Where a rank computes."""

    name: str
    memory: float  # bytes
    speed: Speed | None  # None: not known
    has_bf16: bool = True
    is_cpu: bool = False


def _gpu(
    name: str, gib: float, half: float, single: float, memory: float, link: float
) -> Device:  # TFLOP/s and GB/s
    speed = Speed(half * 1e12, single * 1e12, memory * 1e9, link * 1e9)
    return Device(name, gib * GIB, speed, has_bf16=name not in WITHOUT_BF16)


# The makers' data sheets: bf16 (fp16 where there is none), dense, sums in fp32; fp32; memory; a link is one way of
# NVLink, or of PCIe where there is none. Sheets say GB of memory and mean GiB.
GPUS = {
    gpu.name: gpu
    for gpu in (
        _gpu("b200", 180, 2250, 75, 8000, 900),
        _gpu("gh200", 96, 989, 67, 4000, 450),
        _gpu("h200", 141, 989, 67, 4800, 450),
        _gpu("h200-nvl", 141, 835, 60, 4800, 450),
        _gpu("h100", 80, 989, 67, 3350, 450),
        _gpu("h100-nvl", 94, 835, 60, 3938, 300),
        _gpu("h100-pcie", 80, 756, 51, 2000, 64),
        _gpu("a100", 80, 312, 19.5, 2039, 300),
        _gpu("a100-40gb", 40, 312, 19.5, 1555, 300),
        _gpu("l40s", 48, 362, 91.6, 864, 32),
        _gpu("l4", 24, 121, 30.3, 300, 32),
        _gpu("a10g", 24, 70, 35, 600, 32),
        _gpu("rtx4090", 24, 165, 82.6, 1008, 32),
        _gpu("rtx3090", 24, 71, 35.6, 936, 32),
        _gpu("v100", 32, 125, 15.7, 900, 150),
        _gpu("t4", 16, 65, 8.1, 320, 16),
    )
}

# Whole steps ran at 70 GFLOP/s a core in fp32 and 145 in bf16 (Zen 4 with AVX512-BF16, November 2026), which are two
# thirds of these; cores without such instructions are far slower in bf16.
CPU_CORE = Speed(215e9, 105e9, 10e9, 5e9)


def this_cpu(ranks_per_node: int = 1) -> Device:
    """A rank's share of this machine."""
    cores = len(os.sched_getaffinity(0)) / ranks_per_node
    memory = min(_memory_of_machine(), _memory_of_container()) / ranks_per_node
    speed = Speed(*(cores * figure for figure in CPU_CORE))
    return Device("cpu", memory, speed, is_cpu=True)


def _memory_of_machine() -> float:
    return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


def _memory_of_container() -> float:
    limit = Path("/sys/fs/cgroup/memory.max")  # of cgroups v2; "max" where there is none
    text = limit.read_text(encoding="ascii").strip() if limit.exists() else "max"
    return float("inf") if text == "max" else float(text)


def this_gpu(name: str, memory: float) -> Device:
    """A GPU by the name and the bytes that torch gives; its speed is the table's, if it is in there, and whole."""
    words = set(name.lower().replace("rtx ", "rtx").replace("-", " ").split())
    known = [gpu for key, gpu in GPUS.items() if words.issuperset(key.split("-"))]
    if not known or words & {"mig", "laptop"}:
        return Device(name, memory, None)
    return max(known, key=lambda gpu: len(gpu.name))._replace(memory=memory)
