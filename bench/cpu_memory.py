"""What a forward and backward of the linear takes beside its results: `python -m bench.cpu_memory 4096 4096 512 cpu` prints bytes.

In a process of its own, whose C library gives every block of 64 KiB or more back when it is freed, so that no
temporary hides in memory that is there already.
"""

import gc
import os
import subprocess
import sys
from pathlib import Path

import torch

from nf4lora import NF4LoRALinear, backends


def peak(isa: str, N: int, K: int, M: int, backend: str = "cpu") -> int:
    """Bytes at the peak of a forward and backward in bfloat16 beyond its results, with an instruction set.

    Raises: RuntimeError when it fails, or where the system does not tell.
    """
    command = [sys.executable, "-P", "-m", __spec__.name, *map(str, (N, K, M)), backend]
    told = {"NF4LORA_CPU_ISA": isa, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    env = os.environ | told | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"peak memory with {isa}: {done.stderr.strip().splitlines()[-1]}")
    return int(done.stdout)


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def main() -> None:
    N, K, M = map(int, sys.argv[1:4])
    layer = NF4LoRALinear.from_linear(torch.nn.Linear(K, N, bias=False, dtype=torch.bfloat16), r=16)
    x = torch.randn(M, K, dtype=torch.bfloat16).requires_grad_()
    dy = torch.randn(M, N, dtype=torch.bfloat16)

    def step() -> int:
        y = layer(x)
        return sum(t.nbytes for t in (y, *torch.autograd.grad(y, (x, layer.lora_A, layer.lora_B), dy)))

    with backends.use_backend(sys.argv[4]):
        for _ in range(2):
            step()
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM becomes VmRSS
        before, made = _status("VmRSS"), step()
    print(max(0, _status("VmHWM") - before - made))


if __name__ == "__main__":
    main()
