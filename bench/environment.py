"""What times are weighed by: machine, clocks, versions, commit. `python -m bench.environment` prints it."""

import json
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import nf4lora
from nf4lora import native

PACKAGES = ("triton", "bitsandbytes", "transformers", "peft", "liger_kernel")
_SMI = {
    "driver": "driver_version", "sm_mhz": "clocks.sm", "sm_max_mhz": "clocks.max.sm", "memory_mhz": "clocks.mem",
    "memory_max_mhz": "clocks.max.mem", "power_limit_w": "power.limit", "temperature_c": "temperature.gpu",
}  # fmt: skip


def environment() -> dict[str, Any]:
    """The machine now: read right after a measurement, its clocks are those of the measurement. `gpu` if there is one."""
    found = {
        "date": time.strftime("%Y-%m-%d"),
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "isa": native.host.isa(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "nf4lora": nf4lora.__version__,
        **{name: version(name) for name in PACKAGES},
        "commit": commit(),
    }
    return found | ({"gpu": gpu()} if torch.cuda.is_available() else {})


def version(package: str) -> str | None:
    """Of an installed package, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def commit() -> str:
    """`git describe` of the checkout, "-dirty" included; $NF4LORA_COMMIT where the copy that runs has no history."""
    if told := os.environ.get("NF4LORA_COMMIT"):
        return told
    if not (Path(__file__).parents[1] / "csrc").is_dir():
        return "unknown"  # installed: a history around it is another project's
    try:
        git = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            capture_output=True,
            text=True,
            check=False,
            cwd=Path(__file__).parent,
        )
    except FileNotFoundError:
        return "unknown"
    return git.stdout.strip() or "unknown"


def processor() -> str:
    """Name of the processor."""
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else ():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def gpu() -> dict[str, Any]:
    """The current CUDA device: what torch knows, and clocks, power, driver through NVML or nvidia-smi, else None."""
    device = torch.cuda.get_device_properties(torch.cuda.current_device())
    found = {
        "name": device.name,
        "compute_capability": f"{device.major}.{device.minor}",
        "multiprocessors": device.multi_processor_count,
        "l2_bytes": device.L2_cache_size,
        "memory_bytes": device.total_memory,
        "cuda_runtime": torch.version.cuda,
        **dict.fromkeys(_SMI),
    }
    return found | (_from_nvml() or _from_smi())


def energy_counter() -> Callable[[], float] | None:
    """Reads the current device's energy since its driver was loaded, in millijoules; None where NVML cannot tell."""
    opened = _nvml()
    if opened is None:
        return None
    nvml, handle = opened

    def read() -> float:
        return float(nvml.nvmlDeviceGetTotalEnergyConsumption(handle))

    try:
        read()
    except nvml.NVMLError:
        return None
    return read


def _nvml() -> tuple[Any, Any] | None:
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        uuid = torch.cuda.get_device_properties(torch.cuda.current_device()).uuid
        return pynvml, pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
    except pynvml.NVMLError:
        return None


def _from_nvml() -> dict[str, Any] | None:
    opened = _nvml()
    if opened is None:
        return None
    nvml, handle = opened
    readings: dict[str, Callable[[], Any]] = {
        "driver": nvml.nvmlSystemGetDriverVersion,
        "sm_mhz": lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM),
        "sm_max_mhz": lambda: nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_SM),
        "memory_mhz": lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM),
        "memory_max_mhz": lambda: nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_MEM),
        "power_limit_w": lambda: nvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1000,
        "temperature_c": lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU),
    }
    found = {}
    for name, read in readings.items():
        try:
            found[name] = read()
        except nvml.NVMLError:
            found[name] = None
    return found


def _from_smi() -> dict[str, Any]:
    if not shutil.which("nvidia-smi"):
        return {}
    query = f"--query-gpu={','.join(_SMI.values())}"
    done = subprocess.run(
        ["nvidia-smi", query, "--format=csv,noheader,nounits", f"--id={torch.cuda.current_device()}"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    values = [v.strip() for v in done.stdout.strip().split(",")]
    return dict(zip(_SMI, map(_number, values), strict=True)) if len(values) == len(_SMI) else {}


def _number(text: str) -> float | str | None:
    """A reading of nvidia-smi: "1980" -> 1980.0, "580.159.04" as it is, "[N/A]" -> None."""
    if text.startswith("["):
        return None
    try:
        return float(text)
    except ValueError:
        return text


if __name__ == "__main__":
    print(json.dumps(environment(), indent=1))
