"""What a GPU's memory gives to torch's own kernels."""

from collections.abc import Callable

import torch

COPY_BYTES = 1 << 30
COPIES, ROUNDS = 20, 5
"""Back to back, as one alone has its launch in it: 10% of a copy on the fastest GPUs."""
BANDWIDTHS = ("copy_gb_s", "read_gb_s")


def measured_bandwidth() -> dict[str, float]:
    """GB/s of a copy, bytes read and written, and of a sum."""
    source = torch.ones(COPY_BYTES // 4, dtype=torch.float32, device="cuda")
    target = torch.empty_like(source)
    return {
        "copy_gb_s": _gb_s(lambda: target.copy_(source), 2 * COPY_BYTES),
        "read_gb_s": _gb_s(lambda: source.sum(), COPY_BYTES),
    }


def _gb_s(call: Callable[[], object], num_bytes: int) -> float:
    times = []
    call()
    for _ in range(ROUNDS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(COPIES):
            call()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / COPIES)
    return num_bytes / min(times) / 1e6
