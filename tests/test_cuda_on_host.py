"""The machine of tests/cuda_on_host: what CUDA means on it, what it finds, and that it finds nothing in right kernels.

CUDA_ON_HOST_VARIANTS names the builds under test; the last test runs the file again under AddressSanitizer.
"""

import ctypes
import os
import re
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from cuda_on_host import build, errors

VARIANTS = os.environ.get("CUDA_ON_HOST_VARIANTS", "plain,checker").split(",")
KERNELS = build.HERE / "kernels"
IN_ORDER, GREEDY, RANDOM, EAGER = 0, 1, 4, 2
SEEDS = (0, 1, 2, 3, 4, 5, 6, 7, 12, 13, 14, 15)
CHECKER = pytest.mark.skipif("checker" not in VARIANTS, reason="a test of the checker build")
PLAIN = pytest.mark.skipif("plain" not in VARIANTS, reason="a test of the plain build")


@cache
def library(name, variant):
    return build.load(build.library([KERNELS / f"machine_{name}.cu"], variant))


@pytest.fixture(params=VARIANTS)
def variant(request):
    return request.param


def run(lib, kernel, grid, block, out, values, n=0, shared=0, seed=0, resident=False, written=True):
    """The launch's message, resolved. Not `written`: reading `out` before a kernel has written it is an error."""
    shape = np.array([*grid, *[1] * (3 - len(grid)), *block, *[1] * (3 - len(block)), shared], dtype=np.uint32)
    lib.cuda_on_host_schedule(seed)
    lib.cuda_on_host_resident(int(resident))
    lib.cuda_on_host_forget_all()
    lib.cuda_on_host_register(out.ctypes.data, out.nbytes, int(written), b"out")
    lib.cuda_on_host_register(values.ctypes.data, values.nbytes, 1, b"in")
    function = getattr(lib, f"run_{kernel}")
    function.restype = ctypes.c_char_p
    message = function(*(ctypes.c_void_p(a.ctypes.data) for a in (shape, out, values)), ctypes.c_int(n))
    return errors.resolve(message.decode()) if message else None


def ints(*shape):
    return np.zeros(shape, dtype=np.int32)


def line_of(file, text, kernel=""):
    """The first line of a kernel with this text, as "file:line"."""
    lines = (KERNELS / file).read_text().splitlines(keepends=True)
    first = next(i for i, line in enumerate(lines) if f"void {kernel}" in line)
    return f"{file}:{next(i for i, line in enumerate(lines[first:], first + 1) if text in line)}"


# ---- the language


def test_the_build_says_what_it_is(variant):
    assert library("language", variant).cuda_on_host_build().decode() == variant


@pytest.mark.parametrize("grid, block", [((3, 2, 4), (5, 3, 2)), ((2,), (1024,)), ((1, 7), (2, 2, 64)), ((4,), (1,))])
@pytest.mark.parametrize("seed", [IN_ORDER, GREEDY, RANDOM])
def test_every_thread_knows_where_it_is(variant, grid, block, seed):
    grid, block = (*grid, *[1] * (3 - len(grid))), (*block, *[1] * (3 - len(block)))
    out = ints(int(np.prod(grid)), int(np.prod(block)), 7)
    assert run(library("language", variant), "places", grid, block, out, ints(1), 7, seed=seed) is None
    for b, rows in enumerate(out):
        for t, row in enumerate(rows):
            x, y, z = b % grid[0], b // grid[0] % grid[1], b // (grid[0] * grid[1])
            i, j, k = t % block[0], t // block[0] % block[1], t // (block[0] * block[1])
            assert row.tolist() == [x, y, z, i, j, k, 32]


def test_arguments_are_copied_for_every_thread(variant):
    out = ints(64)
    assert run(library("language", variant), "own_arguments", (1,), (64,), out, np.array([7], np.int32)) is None
    assert out.tolist() == [7 + t for t in range(64)]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("threads", [1, 31, 256])
def test_barriers_and_shared_memory(variant, seed, threads):
    values = np.arange(3 * threads, dtype=np.int32)
    out = ints(3 * threads)
    lib = library("language", variant)
    assert run(lib, "reversed_blocks", (3,), (threads,), out, values, 5, 4 * threads, seed) is None
    assert (out.reshape(3, -1) == values.reshape(3, -1)[:, ::-1]).all()


@pytest.mark.parametrize("resident", [False, True])
def test_threads_that_ended_do_not_hold_a_barrier(variant, resident):
    values, out = np.arange(128, dtype=np.int32), ints(128)
    lib = library("language", variant)
    assert run(lib, "some_leave", (1,), (128,), out, values, 70, 512, resident=resident) is None
    assert out[:70].tolist() == values[:70][::-1].tolist() and not out[70:].any()


@pytest.mark.parametrize("n", [0, 1, 5, 17, 31])
@pytest.mark.parametrize("seed", [IN_ORDER, GREEDY, RANDOM])
def test_shuffles(variant, n, seed):
    out = ints(64, 7, 4)
    assert run(library("language", variant), "shuffles", (1,), (64,), out, ints(1), n, seed=seed) is None
    for t in range(64):
        base, lane = t - t % 32, t % 32
        up = lane - n if lane - n >= lane // 16 * 16 else lane
        down = lane + n if lane + n <= lane // 8 * 8 + 7 else lane
        assert (out[t] == [base + n, base + up, base + down, base + (lane ^ n)]).all(), t


@pytest.mark.parametrize("seed", [IN_ORDER, GREEDY, RANDOM])
def test_votes(variant, seed, n=9):
    values = np.array([t % 3 == 1 for t in range(64)], np.int32)
    out = np.full((64, 6), -1, np.int32)
    assert run(library("language", variant), "votes", (1,), (64,), out, values, n, seed=seed) is None
    for t in range(64):
        lanes = [w for w in range(t - t % 32, t - t % 32 + 32) if (w % 32 < n) == (t % 32 < n)]
        ballot = sum(int(values[w]) << (w % 32) for w in lanes)
        assert np.uint32(out[t, 0]) == ballot and out[t, 1:3].tolist() == [ballot != 0, all(values[w] for w in lanes)]
        in_favour = int(values[: 3 * n].sum())
        assert out[t, 3:].tolist() == ([in_favour, 1, 0] if t < 3 * n else [-1] * 3)


def test_intrinsics(variant):
    values = np.random.default_rng(0).integers(0, 1 << 32, (64, 3), dtype=np.uint32)
    values[0] = values[1, 0] = 0
    out = np.zeros((64, 12), np.uint32)
    assert run(library("language", variant), "intrinsics", (1,), (64,), out, values, 12) is None
    f32 = np.float32
    for (a, b, c), got in zip(values.tolist(), out.tolist()):
        whole, permuted = b << 32 | a, 0
        for i in range(4):
            choice = c >> 4 * i & 15
            byte = whole >> 8 * (choice & 7) & 255
            permuted |= ((255 if byte & 128 else 0) if choice & 8 else byte) << 8 * i
        bits = f"{a:032b}"
        once = f32(1 + 2**-12)
        assert got[:4] == [permuted, bits.count("1"), 32 - a.bit_length(), (a & -a).bit_length()]
        assert got[4:6] == [int(bits[::-1], 2), a * b >> 32]
        assert got[6] == a & 0x7F7FFFFF and got[10] == a
        assert got[7] == f32(2**-11 + 2**-24).view(np.uint32)
        assert got[8] == f32(f32(once * once) - f32(1)).view(np.uint32)
        assert got[9] == (f32(1) / f32(b | 1)).view(np.uint32) and got[11] == f32(f32(1) / f32(3)).view(np.uint32)


@pytest.mark.parametrize("seed", [IN_ORDER, GREEDY, RANDOM])
def test_atomics(variant, seed):
    values = np.random.default_rng(1).integers(-1000, 1000, 4 * 96).astype(np.int32)
    out = ints(10)
    assert run(library("language", variant), "atomics", (4,), (96,), out, values, 77, seed=seed) is None
    assert out[:3].tolist() == [values.sum(), max(values.max(), 0), min(values.min(), 0)]
    assert out[3].view(np.uint32) == np.bitwise_or.reduce(np.left_shift(1, values & 31, dtype=np.int64))
    assert out[4:5].view(np.float32)[0] == values.sum() and out[5] == out[8] == 77
    assert out[6:8].view(np.uint64)[0] == 384 << 33


# ---- schedules


def ran(lib, seed, threads=128, rounds=2):
    out = ints(1 + threads * rounds)
    assert run(lib, "order", (1,), (threads,), out, ints(1), rounds, seed=seed) is None
    return out[1:].reshape(rounds, threads)


def test_schedule_0_runs_threads_in_order(variant):
    assert (ran(library("language", variant), 0)[0] == np.arange(128)).all()


def test_one_warp_runs_as_far_as_it_can(variant):
    firsts = set()
    for seed in range(1, 40, 2):
        for order in ran(library("language", variant), seed):
            assert (order.reshape(4, 32) // 32 == order.reshape(4, 32)[:, :1] // 32).all()
            firsts.add(int(order[0]) // 32)
    assert firsts == {0, 1, 2, 3}


def test_other_schedules_are_random_and_repeat_by_seed(variant):
    lib = library("language", variant)
    orders = {seed: ran(lib, seed).tolist() for seed in range(2, 40, 2)}
    assert len({str(order) for order in orders.values()}) == len(orders)
    assert all(sorted(order[0]) == list(range(128)) != order[0] for order in orders.values())
    assert all(ran(lib, seed).tolist() == order for seed, order in orders.items())


# ---- errors


def error(variant, n, seed=0, resident=False, threads=128):
    lib = library("errors", variant)
    message = run(lib, "errors", (2,), (threads,), ints(256), ints(1), n, seed=seed, resident=resident)
    out = ints(2, threads)
    assert run(lib, "errors", (2,), (threads,), out, ints(1), 99, seed=seed) is None, "the next launch works"
    assert out.tolist() == [list(range(threads))] * 2
    return message


@pytest.mark.parametrize("resident", [False, True])
@pytest.mark.parametrize("seed", [IN_ORDER, GREEDY, RANDOM])
def test_a_divergent_barrier_is_named_at_both_sites(variant, seed, resident):
    message = error(variant, 0, seed, resident)
    assert message.startswith("divergent barrier at ") and " thread " in message and "block (" in message
    assert all(line_of("machine_errors.cu", f"// {which} half") in message for which in ("first", "second"))


@pytest.mark.parametrize(
    "n, says",
    [
        (1, r"deadlock at \S*machine_errors.cu:\d+, block .* thread 64: waits for a named barrier, .* 64 threads"),
        (2, "bad warp mask at .*does not name the calling lane 0"),
        (3, "bad warp mask at .*"),
        (4, "bad warp mask at .*names this lane, which ends"),
        (5, "divergent warp operation at .*thread 16: lane 16 .* while lane 0 waits at .*machine_errors.cu"),
        (6, "bad barrier at .*barrier 3 counts 96 threads here and 64 at"),
        (7, "bad barrier at .*33 threads, which are not whole warps"),
        (8, "deadlock at .*waits for a condition, and so do all 128 threads"),
        (9, "no progress at .*machine_errors.cu"),
        (13, "bad shuffle at .*a width of 5 lanes"),
        (14, "bad barrier at .*barrier 16 of 16"),
        (15, "no progress at .*machine_errors.cu"),
        (16, "deadlock at .*machine_errors.cu.*waits for __syncthreads, .*128.*; thread 5 waits for a condition at"),
    ],
)
def test_errors_are_named_and_the_next_launch_works(variant, n, says):
    message = error(variant, n)
    assert re.match(says, message), message
    for seed in (GREEDY, RANDOM):
        assert error(variant, n, seed).split(" at ")[0] == says.split(" at ")[0]


@pytest.mark.parametrize("n, says", [
    (10, r"(memory fault|out of bounds) at tests/cuda_on_host/kernels/machine_errors.cu:(\d+), .*address 0x4"),
    (11, r"arithmetic fault at tests/cuda_on_host/kernels/machine_errors.cu:(\d+), block \(0,0,0\) thread 0"),
    (12, r"stack overflow at tests/cuda_on_host/kernels/machine_errors.cu:(\d+), block .*262144 bytes of local memory"),
])  # fmt: skip
def test_a_fault_of_the_kernel_is_an_error_of_the_launch(variant, n, says):
    if variant == "address":
        pytest.skip("AddressSanitizer ends the process itself")
    assert re.match(says, error(variant, n)), error(variant, n)


@pytest.mark.parametrize("grid, block, shared", [
    ((0,), (32,), 0), ((1,), (0,), 0), ((1,), (1025,), 0), ((1,), (32, 33), 0), ((1,), (1, 1, 65), 0),
    ((1, 65536), (1,), 0), ((1, 1, 65536), (1,), 0), ((1 << 31,), (1,), 0), ((1,), (32,), (227 << 10) + 1),
])  # fmt: skip
def test_launches_that_cuda_refuses(variant, grid, block, shared):
    message = run(library("errors", variant), "errors", grid, block, ints(1), ints(1), 99, shared)
    assert message.startswith("bad launch: ") and message.endswith("(kernel errors)")


def test_the_largest_block_and_shared_memory(variant):
    out = ints(1024)
    assert run(library("errors", variant), "errors", (1,), (1024,), out, ints(1), 99, 227 << 10) is None
    assert out.tolist() == list(range(1024))


# ---- asynchronous work


@pytest.mark.parametrize("seed", SEEDS)
def test_cp_async_in_two_stages(variant, seed, threads=64, tiles=5):
    values = np.arange(tiles * threads * 4, dtype=np.int32)
    out = ints(values.size)
    lib = library("async", variant)
    assert run(lib, "two_stages", (1,), (threads,), out, values, tiles, 2 * threads * 16, seed, written=False) is None
    pairs = (tiles, threads // 2, 2, 4)
    assert (out.reshape(pairs) == values.reshape(pairs)[:, :, ::-1]).all()


def copies(variant, n, seed, threads=32):
    values, out = np.arange(2 * threads * 4 + 4, dtype=np.int32), np.full(2 * threads, -2, np.int32)
    shared = 2 * threads * 16 - (8 if n == 5 else 0)
    message = run(library("async", variant), "copy_errors", (1,), (threads,), out, values, n, shared, seed)
    return message, out.reshape(2, threads), values[: 2 * threads * 4 : 4].reshape(2, threads)


@pytest.mark.parametrize("n, landed", [(1, [False, False]), (2, [True, False]), (0, [True, True])])
@pytest.mark.parametrize("seed", [IN_ORDER, GREEDY, RANDOM])
def test_copies_land_at_their_wait_or_at_their_issue(variant, n, landed, seed):
    message, out, right = copies(variant, n, seed + EAGER)
    assert message is None and (out == right).all()
    message, out, right = copies(variant, n, seed)
    if variant == "checker" and not all(landed):
        assert message.startswith("uninitialised at tests/cuda_on_host/kernels/machine_async.cu:"), message
        return
    assert message is None
    for row in range(2):
        assert (out[row] == (right[row] if landed[row] else -1)).all(), "shared memory is 0xFF until something lands"


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("n, says", [
    (3, "cp.async in flight at exit at .*machine_async.cu"), (4, "misaligned"), (5, "out of bounds"),
    (6, "cp.async in flight at exit|uninitialised"),
])  # fmt: skip
def test_wrong_copies(variant, seed, n, says):
    message = copies(variant, n, seed)[0]
    if n == 3 and variant == "checker" and not seed & EAGER:
        says = "uninitialised"
    assert re.match(says, message), message


def ring(variant, bug, seed, resident=False, tiles=7, blocks=3):
    values = np.random.default_rng(2).integers(-99, 99, 4 + blocks * tiles * 256).astype(np.int32)
    values[0] = bug
    out = ints(blocks, 96)
    aligned = np.zeros(values.size + 4, np.int32)
    aligned = aligned[-aligned.ctypes.data % 16 // 4 :][: values.size]
    aligned[:] = values
    lib = library("async", variant)
    message = run(lib, "ring", (blocks,), (128,), out, aligned, tiles, 2 * 1024 + 32, seed, resident)
    sums = values[4:].reshape(blocks, tiles, 256).sum((1, 2))
    return message, out.sum(1).tolist() == sums.tolist()


@pytest.mark.parametrize("resident", [False, True])
@pytest.mark.parametrize("seed", SEEDS)
def test_a_ring_of_bulk_copies_and_mbarriers(variant, seed, resident):
    assert ring(variant, 0, seed, resident) == (None, True)


@pytest.mark.parametrize("bug", [1, 2])
def test_a_ring_without_a_wait_is_found(variant, bug):
    found = [ring(variant, bug, seed) for seed in SEEDS]
    assert not all(f == (None, True) for f in found)
    if variant == "checker":
        assert all(message for message, _ in found), found
        assert bug == 1 or any(re.match("race at .*bulk copy", message) for message, _ in found), found


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
@pytest.mark.parametrize("n, says", [
    (1, "too many arrivals"), (2, "uninitialised mbarrier"), (3, "deadlock"), (4, "bulk copy in flight at exit"),
    (5, "misaligned"), (6, "misaligned"), (7, "uninitialised mbarrier"), (8, "bad mbarrier"),
    (9, "uninitialised mbarrier"),
])  # fmt: skip
def test_wrong_mbarriers(variant, seed, n, says):
    values = ints(64)
    values = values[-values.ctypes.data % 16 // 4 :][:16]
    message = run(library("async", variant), "mbarrier_errors", (1,), (1,), ints(2), values, n, 1024 + 8, seed)
    if n == 4 and seed & EAGER:
        assert message is None
    else:
        assert message.startswith(f"{says} at ") and "machine_async.cu:" in message, message


@pytest.mark.parametrize("seed", SEEDS)
def test_named_barriers_hand_over(variant, seed, rounds=6):
    values, out = np.arange(rounds * 32, dtype=np.int32), ints(rounds * 32)
    assert run(library("async", variant), "handed_over", (1,), (64,), out, values, rounds, 128, seed) is None
    assert (out.reshape(rounds, 32) == values.reshape(rounds, 32)[:, np.arange(32) ^ 5]).all()


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_the_queue_of_a_warp(variant, seed):
    out = ints(2)
    lib = library("async", variant)
    assert run(lib, "matrix_queue", (1,), (32,), out, ints(1), 0, seed=seed) is None
    assert out.tolist() == [1 if seed & EAGER else 0, 1]
    assert run(lib, "matrix_queue", (1,), (32,), out, ints(1), 1, seed=seed).startswith("wgmma in flight at exit at ")


# ---- blocks that wait for one another


@pytest.mark.parametrize("resident", [False, True])
@pytest.mark.parametrize("seed", SEEDS)
def test_the_last_block_adds_up(variant, seed, resident, blocks=9, threads=64):
    values = np.random.default_rng(3).integers(0, 100, 501).astype(np.int32)
    values[0] = 0
    out = ints(blocks * threads + 2)
    lib = library("blocks", variant)
    assert run(lib, "last_arriver", (blocks,), (threads,), out, values, 500, 4, seed, resident) is None
    assert out[-2] == np.resize(values[1:], blocks * threads).sum()


@pytest.mark.parametrize("n", range(4))
@pytest.mark.parametrize("seed", SEEDS)
def test_blocks_wait_for_flags(variant, seed, n, blocks=12):
    out = ints(2 * blocks)
    assert run(library("blocks", variant), "chain", (blocks,), (32,), out, ints(1), n, seed=seed, resident=True) is None
    assert out[:blocks].tolist() == list(range(1, blocks + 1))


def test_blocks_that_wait_hang_unless_all_are_resident(variant):
    message = run(library("blocks", variant), "chain", (12,), (32,), ints(24), ints(1), 0, seed=5)
    assert message.startswith("deadlock at ")
    message = run(library("blocks", variant), "chain", (12,), (32,), ints(24), ints(1), 2, seed=5)
    assert message.startswith("no progress at ")


@pytest.mark.parametrize("seed", SEEDS)
def test_a_barrier_of_the_grid(variant, seed, blocks=5, threads=33, rounds=3):
    out = ints(blocks * threads + 1)
    lib = library("blocks", variant)
    assert run(lib, "grid_barrier", (blocks,), (threads,), out, ints(1), rounds, seed=seed, resident=True) is None
    expected = np.arange(blocks * threads) + 1
    for _ in range(rounds - 1):
        expected = np.roll(expected, -threads) + 1
    assert (out[:-1] == expected).all()


def test_very_many_resident_threads(variant, blocks=140, threads=256):
    out = ints(blocks * threads + 1)
    lib = library("blocks", variant)
    for seed in (IN_ORDER, GREEDY):
        out[:] = 0
        assert run(lib, "grid_barrier", (blocks,), (threads,), out, ints(1), 1, seed=seed, resident=True) is None
        assert (out[:-1] == np.arange(blocks * threads) + 1).all()


# ---- the checker

FORMS = range(20)
NO_ERROR = (0, 1, 2, 3)


def checked(kernel, n, seed=0, threads=64, grid=1, shared=256, written=True):
    values = np.ones(256, np.int32)
    values = values[-values.ctypes.data % 16 // 4 :][:64]
    lib = library("checks", "checker")
    return run(lib, kernel, (grid,), (threads,), ints(64 * grid), values, n, shared, seed, written=written)


@CHECKER
@pytest.mark.parametrize("n", FORMS)
@pytest.mark.parametrize("seed", [IN_ORDER, GREEDY, RANDOM])
def test_a_race_is_found_in_every_form_of_store(n, seed):
    message = checked("store_forms", n, seed)
    other = r"against the (write|read) of thread (0|32) at (\S+) "
    found = re.match(r"race at (\S+), block \(0,0,0\) thread (0|32): .*shared\+\d+, " + other, message)
    here = f"tests/cuda_on_host/kernels/{line_of('machine_checks.cu', f' case {n}: ', 'store_forms')}"
    assert found and found[1] == found[5] == here, message


@CHECKER
@pytest.mark.parametrize("n", NO_ERROR)
@pytest.mark.parametrize("seed", SEEDS)
def test_right_kernels_are_not_reported(n, seed):
    assert checked("accesses", n, seed) is None


@CHECKER
@pytest.mark.parametrize("n, says", [
    (10, r"out of bounds .* thread 63: write of 4 bytes to out\+256 of 256 bytes"),
    (11, r"out of bounds .* thread 0: read of 4 bytes from (in-4|address .*|out.*) of 256 bytes"),
    (12, r"out of bounds .* thread 63: write of 4 bytes to shared\+256 of 256 bytes"),
    (13, r"misaligned .* thread 0: read of 4 bytes from in\+2"),
    (14, r"uninitialised .* thread 0: read of 4 bytes from shared\+0, which nobody has written"),
    (16, r"uninitialised .* thread 0: read of 4 bytes from shared\+128"),
    (17, r"uninitialised .* read of 4 bytes from shared\+"),
    (18, r"uninitialised .* thread 0: read of 4 bytes from shared\+4"),
    (19, r"race .* thread 1: write of 4 bytes to out\+0, against the write of thread 0 at \S*machine_checks.cu:\d+"),
    (20, r"race .*against the (write of thread 40|atomic access of thread \d+)"),
    (21, r"out of bounds .*write of 4 bytes .*\(constant memory\)"),
    (22, r"out of bounds .*read of 4 bytes from address 0x.*no memory of the device"),
    (53, r"race .* of 4 bytes (from|to) shared\+\d+, against the (read|write) of thread \d+"),
    (24, r"race .* against the (read|write) of thread \d+"),
    (25, r"misaligned .* thread 0: read of 16 bytes from in\+4"),
    (26, r"race .* against the write of thread \d+"),
    (27, r"out of bounds .*machine_checks.cu.*read of 260 bytes from in\+0 of 256 bytes"),
])  # fmt: skip
def test_what_the_checker_finds(n, says):
    message = checked("accesses", n)
    assert re.match(says, message), message


@CHECKER
@pytest.mark.parametrize("n", [16, 17, 18])
@pytest.mark.parametrize("seed", SEEDS)
def test_a_missing_barrier_is_a_race(n, seed):
    assert re.match("race|uninitialised", checked("accesses", n, seed))
    assert checked("accesses", 30 + n, seed).startswith("race")


@CHECKER
def test_global_memory_that_nobody_wrote():
    assert re.match("uninitialised .*read of 4 bytes from out", checked("accesses", 15, written=False))
    assert checked("accesses", 15, written=True) is None
    assert checked("accesses", 0, written=False) is None


@CHECKER
def test_views_of_one_tensor_are_one_region():
    lib, buffer, values = library("checks", "checker"), ints(128), ints(64)
    for written in (0, 1):
        lib.cuda_on_host_forget_all()
        for first, size, known in ((0, 64, written), (32, 96, 0), (0, 128, 0), (16, 16, 0)):
            lib.cuda_on_host_register(buffer.ctypes.data + 4 * first, 4 * size, known, b"view")
        lib.cuda_on_host_register(values.ctypes.data, 256, 1, b"in")
        lib.run_accesses.restype = ctypes.c_char_p
        shape = (ctypes.c_uint32 * 7)(1, 1, 1, 64, 1, 1, 256)
        arguments = (shape, ctypes.c_void_p(buffer.ctypes.data + 256), ctypes.c_void_p(values.ctypes.data))
        assert lib.run_accesses(*arguments, 10) is not None
        assert (lib.run_accesses(*arguments, 15) is None) == bool(written)


@CHECKER
@pytest.mark.parametrize("resident", [False, True])
def test_races_between_blocks(resident):
    def between(n, seed=0):
        lib = library("checks", "checker")
        return run(lib, "between_blocks", (4,), (32,), ints(256), ints(1), n, seed=seed, resident=resident)

    assert between(0) is None
    first, second = r"block \(1,0,0\) thread 0: write of 4 bytes to out\+0", r"the write of block \(0,0,0\) thread 0 at"
    assert re.match(f"race .*{first}, against {second}", between(1))
    assert re.match(r"race .*against the (read|write) of block", between(2))


@CHECKER
@pytest.mark.parametrize("bug", [1, 2])
@pytest.mark.parametrize("resident", [False, True])
def test_wrong_last_arrivers(bug, resident, blocks=9):
    values = np.ones(501, np.int32)
    values[0] = bug
    lib = library("blocks", "checker")
    for seed in SEEDS:
        out = ints(blocks * 64 + 2)
        message = run(lib, "last_arriver", (blocks,), (64,), out, values, 500, 4, seed, resident)
        assert message and message.startswith("race"), (seed, message)


@CHECKER
@pytest.mark.parametrize("seed", [IN_ORDER, GREEDY, RANDOM])
@pytest.mark.parametrize("n", [1, 2, 3, 4, 8])
def test_sectors_and_bank_wavefronts_are_counted(n, seed):
    values, out = (np.zeros(size + 32, np.int32) for size in (256 * n, 64))
    values, out = (a[-a.ctypes.data % 128 // 4 :][: a.size - 32] for a in (values, out))
    lib = library("checks", "checker")
    assert run(lib, "strides", (1,), (64,), out, values, n, 1024 * n, seed) is None
    counted = {}
    for line in lib.cuda_on_host_profile().decode().splitlines():
        found = re.fullmatch(r"(\S+) ((?:global|shared) (?:load|store)) (\d+) (\S+)", line)
        site, kind, accesses, ratio = found.groups()
        counted[errors.resolve(site).rsplit("/", 1)[1]] = (kind, int(accesses), float(ratio))
    odd = {1: 1, 2: 2, 3: 1, 4: 4, 8: 8}[n]
    for what, kind, ratio in (
        ("// global int", "global load", n), ("// global int4", "global load", min(n, 2)),
        ("// global bfloat16", "global load", n), ("// global broadcast", "global load", 1),
        ("// global store", "global store", 1), ("// shared int", "shared store", odd),
        ("// shared int2", "shared load", odd), ("// shared int4", "shared store", odd),
        ("// shared broadcast", "shared load", 1), ("// shared bfloat16", "shared load", 1),
    ):  # fmt: skip
        assert counted[line_of("machine_checks.cu", f"{what}\n", "strides")] == (kind, 2, ratio), what


def test_other_builds_count_nothing():
    if "plain" in VARIANTS:
        lib = library("checks", "plain")
        assert run(lib, "between_blocks", (4,), (32,), ints(256), ints(1)) is None
        assert lib.cuda_on_host_profile() == b""


# ---- the build


def test_two_builders_at_a_time(tmp_path):
    source = tmp_path / "k.cu"
    source.write_text((KERNELS / "machine_errors.cu").read_text())
    program = f"from cuda_on_host import build; print(build.library([{str(source)!r}], 'plain', ['NAME=1']))"
    environment = os.environ | {"NF4LORA_BUILD_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(build.HERE.parent)}
    environment["CPATH"] = str(KERNELS)
    command = [sys.executable, "-c", program]
    both = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [p.communicate()[0] for p in both]
    assert [p.returncode for p in both] == [0, 0] and said[0] == said[1]
    assert Path(said[0].strip()).exists()
    left = [p.suffix for p in (tmp_path / "cache").iterdir()]
    assert set(left) == {".o", ".so"} and left.count(".so") == 1


def test_a_kernel_that_does_not_compile_says_so(tmp_path):
    (tmp_path / "k.cu").write_text("__global__ void k() { undeclared; }")
    with pytest.raises(RuntimeError, match="undeclared"):
        build.library([tmp_path / "k.cu"])


def test_missing_cuda_headers_are_one_clear_error(monkeypatch):
    monkeypatch.setattr(Path, "is_file", lambda self: False)
    build._cuda_include.cache_clear()
    with pytest.raises(RuntimeError, match="CUDA_HOME"):
        build._cuda_include()
    build._cuda_include.cache_clear()


@PLAIN
def test_speed():
    """Far below what an idle core does (50 M threads/s; 30 ns a barrier), but a machine gone quadratic is found."""
    lib = library("language", "plain")
    n = 1 << 20
    values, out = np.zeros(n, np.float32), np.zeros(n, np.float32)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        assert run(lib, "elementwise", (n // 256,), (256,), out, values, n) is None
        times.append(time.perf_counter() - start)
    assert n / min(times) > 2e6
    start = time.perf_counter()
    assert run(lib, "reversed_blocks", (64,), (1024,), ints(65536), ints(65536), 10, 4096) is None
    assert (time.perf_counter() - start) / (64 * 1024 * 20) < 1e-6


# ---- under AddressSanitizer


def under_address_sanitizer(*command):
    environment = {
        **os.environ, "LD_PRELOAD": str(build.libasan()), "ASAN_OPTIONS": "detect_leaks=0",
        "CUDA_ON_HOST_VARIANTS": "address", "PYTHONPATH": f"{build.ROOT}:{build.HERE.parent}",
    }  # fmt: skip
    command = [sys.executable, *command]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)


if VARIANTS != ["address"]:

    def test_this_file_under_address_sanitizer():
        for name in ("language", "errors", "async", "blocks", "checks"):
            build.library([KERNELS / f"machine_{name}.cu"], "address")  # here: the compiler is slow under a sanitizer
        done = under_address_sanitizer("-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider", __file__)
        assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-3000:] + done.stderr[-3000:]
        assert "ERROR: AddressSanitizer" not in done.stderr + done.stdout

    @pytest.mark.parametrize("n, says", [
        (10, "heap-buffer-overflow"), (11, "heap-buffer-overflow"), (12, "use-after-poison"),
        (13, "misaligned address"), (25, "misaligned address"),
    ])  # fmt: skip
    def test_address_sanitizer_finds(n, says):
        program = (
            "import ctypes, sys; from cuda_on_host import build; lib = build.load(sys.argv[1])\n"
            "libc = ctypes.CDLL(None); libc.malloc.restype = ctypes.c_void_p\n"
            "out, values = (ctypes.c_void_p(libc.malloc(256)) for _ in range(2)); ctypes.memset(values, 0, 256)\n"
            f"lib.run_accesses((ctypes.c_uint32 * 7)(1, 1, 1, 64, 1, 1, 256), out, values, {n})"
        )
        done = under_address_sanitizer("-c", program, str(build.library([KERNELS / "machine_checks.cu"], "address")))
        assert done.returncode != 0 and says in done.stderr and "machine_checks.cu" in done.stderr, done.stderr[-2000:]
