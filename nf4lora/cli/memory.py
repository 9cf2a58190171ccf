"""Peak bytes of live tensors in one training step."""

from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile


def peak_bytes(step: Callable[[], object], device: torch.device, held: int) -> int:
    """`held` (what lives before: weights, optimizer state) and the most that `step` holds beyond it at one time.

    On a GPU: the allocator's own peak. On a CPU: every allocation and release that torch's allocator reports to the
    profiler while `step` runs, summed in order; temporaries inside ops are among them, scratch outside torch is not.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        step()
        return torch.cuda.max_memory_allocated(device)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=False) as profiler:
        step()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return held + peak
