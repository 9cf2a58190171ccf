"""Everything a GPU is asked, in one command: `python -m bench.gpu_report --out DIR`, within --minutes (9).

Needs a GPU, nvcc, and a Python with torch, triton, setuptools, pytest and hypothesis; no network. Builds the package
for this card alone and installs it into a temporary folder, then runs the tests, the benchmarks, compute-sanitizer and
the rest against that, most important first. Each step has a share of the time; what a step leaves over is the next
ones'. DIR gets gpu_report.log and gpu_report.json, renewed at every step, and what the steps write: nothing is lost to
a limit. The exit code is 0 only if every step that is a gate was green.
"""

import argparse
import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

from . import report
from .files import load, write

ROOT = Path(__file__).parents[1]
PYTHON = "python"  # stands for the interpreter that runs this
TESTS = (
    "test_linear_paths.py", "test_training_backends.py", "test_quantize.py", "test_dequantize.py", "test_cuda.py", "test_triton*.py",
    "test_optim*.py",
)  # fmt: skip
WITH_BITSANDBYTES = ("test_bitsandbytes.py",)
ON_GPU = "(cuda or triton) and not cuda_on_host"
BACKENDS = ("cuda", "triton")
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
GRACE_S = 4.0  # of a step that is told to stop, before it is killed
WRAP_UP_S = 10.0  # of the whole time, for the summary


@dataclass(frozen=True)
class Step:
    """Commands run one after the other until one fails. `share_s`: its part of nine minutes. `gate`: must be green."""

    name: str
    commands: tuple[tuple[str, ...], ...]
    share_s: float
    gate: bool = True
    environment: tuple[tuple[str, str], ...] = ()


@dataclass
class Outcome:
    """What became of a step: "ok", "failed", "timeout", "absent" (no such program), "running" or "no time left"."""

    name: str
    state: str
    gate: bool
    seconds: float = 0.0
    limit_s: float = 0.0
    rc: int | None = None
    tail: str = ""


def steps(out: Path, site: Path, peers: Path | None = None) -> list[Step]:
    """What is run, most important first. A later part adds its entry here."""
    install = (
        "-m pip install --no-deps --no-index --no-build-isolation --disable-pip-version-check -v --upgrade --target"
    )
    loads = "from nf4lora.native_cuda import cuda; raise SystemExit(cuda.why_not())"
    pytest = (
        "-m",
        "pytest",
        *_tests(peers),
        "-k",
        ON_GPU,
        "-v",
        "--tb=short",
        "-p",
        "no:cacheprovider",
        "--durations=10",
    )
    # Not errors of the API: torch and Triton ask the driver for functions it lacks, and our own calls are checked.
    watched = ("--report-api-errors", "no", "--error-exitcode", "9", PYTHON, "-m", "bench.sanitize", *BACKENDS)
    uncached = (("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),)
    return [
        Step("environment", (("nvidia-smi",), ("nvcc", "--version"), (PYTHON, "-m", "pip", "list")), 8, gate=False),
        Step("build", ((PYTHON, *install.split(), str(site), str(ROOT)), (PYTHON, "-c", loads)), 110),
        Step("machine", ((PYTHON, "-m", "bench.environment"),), 10, gate=False),
        Step("tests", ((PYTHON, *pytest),), 97),
        Step("bench_linear", ((PYTHON, "-m", "bench.bench_linear", "--device", "cuda", "--out", str(out)),), 50),
        Step("bench_layer", ((PYTHON, "-m", "bench.bench_layer", "--device", "cuda", "--out", str(out)),), 40),
        Step("bench_host", ((PYTHON, "-m", "bench.bench_host", "--device", "cuda", "--out", str(out)),), 15),
        Step("bench_optim", ((PYTHON, "-m", "bench.bench_optim", "--only", "resident,moves,hidden", "--device", "cuda", "--out", str(out)),), 41),
        Step("bench_quantize", ((PYTHON, "-m", "bench.bench_quantize", "--device", "cuda", "--out", str(out)),), 26),
        Step("bench_model", ((PYTHON, "-m", "bench.bench_model", "--layers", "4", "--device", "cuda", "--out", str(out)),), 26, gate=False),
        Step("puzzle", ((PYTHON, "-m", "bench.puzzle", "--out", str(out)),), 13),
        Step("selftest", ((PYTHON, "-m", "nf4lora.selftest", *BACKENDS),), 11),
        *(Step(t, (("compute-sanitizer", "--tool", t, *watched),), 11, environment=uncached) for t in SANITIZERS),
        Step("golden vectors", ((PYTHON, "-m", "cuda_on_host.golden", str(out / "golden.npz")),), 10, gate=False),
        Step("tune", ((PYTHON, "-m", "bench.tune", "--minutes", "0.3", "--out", str(out)),), 21, gate=False),
        Step("doctor", ((PYTHON, "-m", "nf4lora.cli", "doctor"),), 8, gate=False),
    ]  # fmt: skip


def run(planned: Sequence[Step], out: Path, minutes: float, environment: dict[str, str]) -> list[Outcome]:
    """Run the steps in order, each until the end of its share; one that fails or hangs does not stop the next."""
    out.mkdir(parents=True, exist_ok=True)
    scale = max(minutes * 60 - WRAP_UP_S, 0) / sum(step.share_s for step in planned)
    begun, share_s = time.monotonic(), 0.0
    outcomes = [Outcome(step.name, "no time left", step.gate) for step in planned]
    with (out / "gpu_report.log").open("ab", buffering=0) as log:
        for step, outcome in zip(planned, outcomes, strict=True):
            share_s += step.share_s * scale
            outcome.limit_s = share_s - (time.monotonic() - begun)
            if outcome.limit_s < min(1, step.share_s * scale / 2):
                continue
            outcome.state = "running"
            _summarize(out, outcomes)
            _execute(step, outcome, log, environment | dict(step.environment))
            _summarize(out, outcomes)
            print(
                f"[{time.monotonic() - begun:4.0f} s] {step.name}: {outcome.state} ({outcome.seconds:.0f} s)",
                flush=True,
            )
    _summarize(out, outcomes)
    return outcomes


def green(outcomes: Sequence[Outcome]) -> bool:
    """Whether every gate was passed."""
    return all(outcome.state == "ok" for outcome in outcomes if outcome.gate)


def environment(site: Path, peers: Path | None, commit: str | None) -> dict[str, str]:
    """What the steps run in: the installed package before the source tree, whose nf4lora has no triton_kernels."""
    cuda = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
    paths = [*([str(peers.resolve())] if peers else []), str(site), str(ROOT), str(ROOT / "tests")]
    found = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])]),
        "PATH": os.pathsep.join([os.environ.get("PATH", os.defpath), str(cuda / "bin")]),
        "PYTHONSAFEPATH": "1",
        "PYTHONUNBUFFERED": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    if commit:
        found["NF4LORA_COMMIT"] = commit
    if archs := _arch():
        found["NF4LORA_CUDA_ARCHS"] = archs
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--out", type=Path, default=Path("gpu_report"), metavar="DIR")
    parser.add_argument(
        "--peers", type=Path, metavar="DIR", help="a folder of unpacked packages, such as bitsandbytes, to compare with"
    )
    parser.add_argument("--commit", help="what the results name where this copy has no git history")
    parser.add_argument("--only", help="steps to run, by name, separated by commas; what is not built is not there")
    parser.add_argument("--dry-run", action="store_true", help="list the steps, their time and their commands")
    asked = parser.parse_args(arguments)
    out, begun = asked.out.resolve(), time.monotonic()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory(prefix="nf4lora-site-") as site:
        planned = steps(out, Path(site), asked.peers)
        if asked.only:
            wanted = [name.strip() for name in asked.only.split(",")]
            if unknown := set(wanted) - {step.name for step in planned}:
                parser.error(f"no such step: {sorted(unknown)}; there are {[step.name for step in planned]}")
            planned = [step for step in planned if step.name in wanted]
        if asked.dry_run:
            print(plan(planned, asked.minutes))
            return 0
        _assemble(Path(site))
        found = environment(Path(site), asked.peers, asked.commit)  # imports torch, which takes a cold machine a while
        outcomes = run(planned, out, asked.minutes - (time.monotonic() - begun) / 60, found)
    print(summary(outcomes, out), flush=True)
    return 0 if green(outcomes) else 1


def plan(planned: Sequence[Step], minutes: float) -> str:
    """The steps as text: seconds, name, commands."""
    scale = max(minutes * 60 - WRAP_UP_S, 0) / sum(step.share_s for step in planned)
    lines = []
    for step in planned:
        lines.append(f"{step.share_s * scale:4.0f} s  {step.name}{' (gate)' if step.gate else ''}")
        lines += [f"          {shlex.join(command)}" for command in step.commands]
    return "\n".join([*lines, f"{minutes * 60:4.0f} s  in all, {WRAP_UP_S:.0f} s of them for the summary"])


def summary(outcomes: Sequence[Outcome], out: Path) -> str:
    """What came out, for a reader of the last lines: tables, the ends of what went wrong, a line a step."""
    parts = []
    for stem, document in load(out).items():
        if text := report.markdown(document):
            parts.append(f"### {stem}\n\n{text}\n")
    parts += [f"### {o.name}: {o.state}\n\n{o.tail[-1500:]}\n" for o in outcomes if o.state in ("failed", "timeout")]
    parts += [
        f"{o.state:13} {o.seconds:5.0f} s of {o.limit_s:4.0f}  {o.name}{' (gate)' if o.gate else ''}" for o in outcomes
    ]
    return "\n".join([*parts, "all gates are green" if green(outcomes) else "NOT all gates are green"])


def _execute(step: Step, outcome: Outcome, log, environment: dict[str, str]) -> None:
    begun, start = time.monotonic(), log.tell()
    outcome.state = "ok"
    for command in step.commands:
        command = tuple(sys.executable if word == PYTHON else word for word in command)
        log.write(f"\n==== {step.name}: {shlex.join(command)}\n".encode())
        try:
            outcome.rc = _wait(command, outcome.limit_s - (time.monotonic() - begun), log, environment)
        except FileNotFoundError:
            outcome.state = "absent"
            log.write(f"{command[0]} is not on the PATH\n".encode())
        else:
            outcome.state = "timeout" if outcome.rc is None else "failed" if outcome.rc else "ok"
        if outcome.state != "ok":
            break
    outcome.seconds = time.monotonic() - begun
    outcome.tail = _tail(Path(log.name), start)


def _wait(command: Sequence[str], limit_s: float, log, environment: dict[str, str]) -> int | None:
    """The exit code, or None where it took too long. What the command started ends with it, and with this process."""
    # In a process group, not a session: what is left over goes when the machine's command ends.
    streams = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": subprocess.STDOUT}
    process = subprocess.Popen(command, **streams, cwd=ROOT, env=environment, process_group=0)
    try:
        return process.wait(max(limit_s - GRACE_S, limit_s / 2, 0.1))
    except subprocess.TimeoutExpired:
        # pytest and our benchmarks answer an interrupt with what they have
        _kill(process, signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(min(GRACE_S, limit_s / 2))
        return None
    finally:
        _kill(process, signal.SIGKILL)
        process.wait()


def _kill(process: subprocess.Popen, how: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, how)


def _summarize(out: Path, outcomes: Sequence[Outcome]) -> None:
    write(out / "gpu_report.json", {"green": green(outcomes), "steps": [asdict(outcome) for outcome in outcomes]})


def _tail(path: Path, start: int, most: int = 3000) -> str:
    with path.open("rb") as file:
        file.seek(start)
        return file.read()[-most:].decode(errors="replace")


def _assemble(site: Path) -> None:
    """The Python half of an installation, for the steps after a build that fails: Triton needs no compiler of ours."""
    leave = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "nf4lora", site / "nf4lora", ignore=leave)
    shutil.copytree(ROOT / "triton_kernels", site / "nf4lora" / "triton_kernels", ignore=leave)


def _tests(peers: Path | None) -> list[str]:
    """The test files that are there; bitsandbytes' where it can be imported."""
    compared = find_spec("bitsandbytes") or (peers and (peers / "bitsandbytes").is_dir())
    patterns = TESTS + (WITH_BITSANDBYTES if compared else ())
    return [str(path.relative_to(ROOT)) for pattern in patterns for path in sorted((ROOT / "tests").glob(pattern))]


def _arch() -> str | None:
    """This card's architecture as NF4LORA_CUDA_ARCHS wants it, or None without a card."""
    code = "import torch; print(*torch.cuda.get_device_capability(), sep='') if torch.cuda.is_available() else None"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False).stdout.strip()
    return {"90": "90a"}.get(found, found) or None


if __name__ == "__main__":
    sys.exit(main())
