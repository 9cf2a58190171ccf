"""The Triton kernels beyond what every back end is tested for: sizes, memory around the buffers, tables, asm, refusals.

Without a GPU they run in Triton's interpreter; tests/test_codegen_triton.py runs what the compiler makes of them.
"""

import os
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from nf4lora import backends, ops, reference, triton_rows, triton_tiles
from nf4lora.codebook import BLOCKSIZES, QUANT_TYPES, boundaries, code_order, codebook

if find_spec("triton") is None and (sys.platform, os.uname().machine) != ("linux", "x86_64"):
    pytest.skip("Triton has no release for this machine", allow_module_level=True)

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
GUARD = 512  # bytes before and after each buffer

sys.path.append(str(Path(__file__).parents[1]))  # behind what is installed: bench is not

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning"),  # numpy's, in the interpreter
]


@pytest.fixture(autouse=True)
def on_triton():
    with backends.use_backend("triton"):
        yield


@pytest.fixture
def nf4():
    from nf4lora.triton_kernels import nf4

    return nf4


def same_bits(a, b):
    a, b = a.cpu(), b.cpu()
    if a.is_floating_point():
        a, b = (torch.where(t.isnan(), torch.full_like(t, torch.nan), t) for t in (a, b))
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def assert_bfloat16(found, wanted):
    """`found`, in bfloat16, of float32 `wanted`. The interpreter truncates, and has a way of its own with denormals and NaN."""
    if GPU:
        assert same_bits(found, wanted.bfloat16())
    else:
        normal = wanted.isfinite() & ((wanted.abs() >= torch.finfo(torch.float32).smallest_normal) | (wanted == 0))
        assert same_bits(found[normal], (wanted[normal].view(torch.int32) >> 16).to(torch.int16).view(torch.bfloat16))


def check(a, blocksize, quant_type, nested):
    """quantize, quantize_absmax and dequantize of `a` against the reference."""
    packed, absmax = ops.quantize(a, blocksize, quant_type)
    wanted = reference.quantize(a, blocksize, quant_type)
    assert same_bits(packed, wanted[0]) and same_bits(absmax, wanted[1])
    nested_absmax = offset = None
    if nested:
        offset = absmax.mean().reshape(1)
        wanted = reference.quantize_absmax(absmax, offset)
        absmax, nested_absmax = ops.quantize_absmax(absmax, offset)
        assert same_bits(absmax, wanted[0]) and same_bits(nested_absmax, wanted[1])
    args = packed, absmax, nested_absmax, offset, list(a.shape), blocksize, quant_type
    for dtype in (torch.float32, torch.float16):
        assert same_bits(ops.dequantize(*args, dtype), reference.dequantize(*args, dtype))
    assert_bfloat16(ops.dequantize(*args, torch.bfloat16), reference.dequantize(*args, torch.float32))


@pytest.mark.parametrize("blocksize", BLOCKSIZES)
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_bytes_equal_the_reference_over_blocksizes(quant_type, blocksize, figures):
    g = torch.Generator().manual_seed(blocksize)
    for dtype, nested in ((torch.float32, False), (torch.bfloat16, True), (torch.float16, True)):
        for numel in (1, blocksize - 1, 2 * blocksize, 2 * blocksize + 9):
            check(torch.randn(numel, generator=g).to(dtype).to(DEVICE), blocksize, quant_type, nested)
            figures["elements compared with the Triton kernels"] += 4 * numel


def test_every_small_size():
    g = torch.Generator().manual_seed(0)
    for numel in (*range(70), *range(71, 300, 9), 255, 256, 257, 299):
        a = torch.randn(numel, generator=g).to(FLOATS[numel % 3]).to(DEVICE)
        check(a, (32, 64, 128)[numel % 5 % 3], QUANT_TYPES[numel % 2], nested=numel % 7 > 2)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_zeros_denormals_nan_and_inf(quant_type, dtype):
    a = torch.randn(12, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    a[1], a[2] = 0, -0.0
    a[3] = torch.finfo(dtype).smallest_normal / 8 * a[3].sign()
    a[4] = torch.finfo(dtype).max * a[4].sign()
    for row, value in ((6, torch.nan), (7, torch.inf), (8, -torch.inf)):
        a[row, 17] = value
    a[9, 3], a[9, 4], a[11, -1] = torch.inf, torch.nan, torch.nan
    for numel in (a.numel(), a.numel() - 3):  # and -3: a NaN block whose padding is none
        check(a.reshape(-1)[:numel].to(DEVICE), 64, quant_type, False)
    a[11, -4] = torch.nan
    packed, _ = ops.quantize(a.reshape(-1)[: a.numel() - 3].to(DEVICE), 64, quant_type)
    assert int(packed[-1]) & 15 == code_order(quant_type)[7]


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_boundaries_and_their_neighbours(quant_type):
    near = [boundaries(quant_type)]
    for direction in (-2.0, 2.0):
        for _ in range(3):
            near.append(torch.nextafter(near[-1] if len(near) % 4 else near[0], torch.tensor(direction)))
    values = torch.cat([*near, torch.linspace(-1, 1, 4001)])
    a = torch.cat([torch.ones(len(values), 1), values[:, None], torch.zeros(len(values), 30)], 1).to(DEVICE)
    packed, absmax = ops.quantize(a, 32, quant_type)
    assert same_bits(packed, reference.quantize(a, 32, quant_type)[0]) and bool((absmax == 1).all())


@pytest.fixture
def guarded(monkeypatch):
    """`guarded(t)`: a copy of t between guard bytes. All outputs are too. On leaving, every guard must be untouched."""
    kept = []

    def place(shape, dtype, device):
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        numel = torch.Size(shape).numel()
        nbytes = numel * torch.empty((), dtype=dtype).element_size()
        memory = torch.full((2 * GUARD + nbytes,), 0xA5, dtype=torch.uint8, device=device)
        kept.append((memory, nbytes))
        return memory[GUARD : GUARD + nbytes].view(dtype).view(shape)

    def new_empty(self, *shape, dtype=None, device=None):
        shape = shape[0] if len(shape) == 1 else shape
        return place(shape, dtype or self.dtype, self.device)

    def copy(t):
        return None if t is None else place(t.shape, t.dtype, t.device).copy_(t)

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    yield copy
    monkeypatch.undo()
    for memory, nbytes in kept:
        assert bool((memory[:GUARD] == 0xA5).all()) and bool((memory[GUARD + nbytes :] == 0xA5).all())
    assert kept


@pytest.mark.parametrize("numel", (1, 7, 8, 9, 63, 64, 65, 255, 300, 1023, 4097))
@pytest.mark.parametrize("nested", (False, True))
def test_nothing_is_written_beside_the_buffers(guarded, nested, numel):
    g = torch.Generator().manual_seed(numel)
    for dtype in FLOATS:
        a = guarded(torch.randn(numel, generator=g).to(dtype).to(DEVICE))
        packed, absmax = ops.quantize(a, 64, "nf4")
        nested_absmax = offset = None
        if nested:
            offset = guarded(absmax.mean().reshape(1))
            absmax, nested_absmax = ops.quantize_absmax(absmax, offset)
        out = ops.dequantize(packed, absmax, nested_absmax, offset, [numel], 64, "nf4", dtype)
        assert out.isfinite().all()


def test_views_of_any_stride_and_start():
    square = torch.randn(70, 90, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    for view in (square.T, square[:, ::2], square[5:6].expand(9, 90), square.reshape(-1)[1:], square.reshape(-1)[3:67]):
        check(view, 64, "nf4", True)
    packed, absmax = ops.quantize(square, 64, "nf4")
    wanted = ops.dequantize(packed, absmax, None, None, [70, 90], 64, "nf4", torch.float32)
    for start in range(1, 5):
        memory = torch.full((len(packed) + 8,), 0xA5, dtype=torch.uint8, device=DEVICE)
        shifted = memory[start : start + len(packed)].unsqueeze(1).copy_(packed)
        assert same_bits(ops.dequantize(shifted, absmax, None, None, [70, 90], 64, "nf4", torch.float32), wanted)


def test_every_small_and_large_config_gives_the_same_bytes(monkeypatch):
    a = torch.randn(20_001, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    found = []
    for weights in (1024, 4096):
        monkeypatch.setattr(triton_tiles, "triton_dequantize", lambda numel, weights=weights: triton_tiles.TritonConfig(weights, 4))
        monkeypatch.setattr(triton_tiles, "triton_quantize", lambda blocksize, weights=weights: triton_tiles.TritonConfig(weights, 4))
        packed, absmax = ops.quantize(a, 64, "nf4")
        found.append((packed, absmax, ops.dequantize(packed, absmax, None, None, [len(a)], 64, "nf4", torch.float32)))
    assert all(map(same_bits, *found))


@pytest.mark.skipif(not GPU, reason="the interpreter takes the plain path; test_codegen_triton.py runs the compiled one")
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_large_tensors_on_the_gpu(dtype):
    a = torch.randn(3001, 4096, generator=torch.Generator().manual_seed(0)).to(dtype).cuda()
    for blocksize in (64, 4096):
        for nested in (False, True):
            check(a, blocksize, "nf4", nested)


@pytest.mark.skipif(not GPU, reason="eight gigabytes, and an hour in the interpreter")
def test_more_than_2_to_the_31_elements():
    numel = 2**31 + 101
    a = torch.zeros(numel, dtype=torch.bfloat16, device=DEVICE)
    a[-4197:] = torch.randn(4197, generator=torch.Generator().manual_seed(0)).bfloat16().cuda()
    packed, absmax = ops.quantize(a, 64, "nf4")
    wanted = reference.quantize(a[2**31 - 4096 :], 64, "nf4")
    assert same_bits(packed[2**30 - 2048 :], wanted[0]) and same_bits(absmax[2**25 - 64 :], wanted[1])
    assert bool((packed[: 2**30 - 2048] == 0x77).all())
    found = ops.dequantize(packed, absmax, None, None, [numel], 64, "nf4", torch.bfloat16)
    again = reference.dequantize(*wanted, None, None, [4197], 64, "nf4", torch.bfloat16)
    assert same_bits(found[2**31 - 4096 :], again) and found[: 2**31 - 4096].count_nonzero() == 0


# ---- the instructions of the inline asm, executed here for 32 lanes; tests/test_codegen_triton.py runs their text


def execute(program, registers, table):
    """registers: name -> int64 [32], one value a lane. table: int64 words of 32 bits at address 0."""
    registers = dict(registers) | {"%laneid": torch.arange(32), "table": torch.zeros(32, dtype=torch.int64)}
    for operation, target, operands in program:
        a = [registers.get(o, o) for o in operands]
        match operation.split(".")[0]:
            case "mov":
                out = a[0]
            case "and":
                out = a[0] & a[1]
            case "shr":
                out = a[0] >> a[1]
            case "mad":
                out = a[0] * a[1] + a[2]
            case "ld":
                name, _, plus = a[0].strip("[]").partition("+")
                out = table[(registers[name] + int(plus or 0)) // 4]
            case "shfl":
                assert a[2:] == [31, 0xFFFFFFFF]
                out = a[0][a[1] & 31]
        registers[target] = out
    return registers


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_the_decode_instructions_are_right_for_every_half_word(nf4, quant_type):
    values = codebook(quant_type).view(torch.int32).long() & 0xFFFFFFFF
    halves = torch.arange(2**16).reshape(-1, 32)
    other = (halves * 40_503 + 12_345) & 0xFFFF
    for low, high in zip(halves, other, strict=True):
        words = {"w0": low | high << 16, "w1": high | low << 16, "w2": low | low << 16, "w3": ~low & 0xFFFF}
        found = execute(nf4.decode_program(), words, values)
        for number, word in enumerate(words.values()):
            for element in range(8):
                nibble = word >> (4 * (element ^ 1)) & 15
                assert torch.equal(found[f"v{element}_{number}"], values[nibble])


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_the_encode_instructions_take_the_entry_of_the_cell(nf4, quant_type):
    cells = nf4.cells(quant_type)
    table = torch.stack([cells & 0xFFFFFFFF, cells >> 32 & 0xFFFFFFFF], 1).reshape(-1)
    v = torch.linspace(-1, 1, 32 * 8).reshape(8, 32)
    sums = (v * nf4.CELLS_PER_UNIT + (1.5 * 2.0**23 + 16)).view(torch.int32).long()
    found = execute(nf4.encode_program(), {f"s{i}": s for i, s in enumerate(sums)}, table)
    for i in range(8):
        wanted = cells[torch.round(v[i] * nf4.CELLS_PER_UNIT).long() + 16]
        assert torch.equal(found[f"lower{i}"], wanted & 0xFFFFFFFF) and torch.equal(found[f"upper{i}"], wanted >> 32 & 0xFFFFFFFF)


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_the_cells_refuse_a_codebook_that_does_not_suit_them(nf4, quant_type, monkeypatch):
    shifted = boundaries(quant_type).clone()
    shifted[4] = shifted[3] + 1e-3
    nf4.cells.__wrapped__(quant_type)
    monkeypatch.setattr(nf4, "boundaries", lambda name: shifted)
    with pytest.raises(ValueError, match="two boundaries in one cell"):
        nf4.cells.__wrapped__(quant_type)


# ---- the rows


def test_what_runs_on_what(monkeypatch):
    assert triton_rows.why_not() is None and triton_rows.why_not(torch.zeros(2, device=DEVICE), 64, "nf4") is None
    assert "float64" in triton_rows.why_not(torch.zeros(2, dtype=torch.float64), 64, "nf4")
    monkeypatch.setattr(triton_rows, "interpreted", lambda: False)
    assert "no cpu tensors" in triton_rows.why_not(torch.zeros(2), 64, "nf4")
    for capability, reason in (((7, 0), "capability"), ((7, 5), None), ((9, 0), None)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, capability=capability: capability)
        found = triton_rows.why_not(Stub(), 64, "nf4")
        assert reason in found if reason else found is None


class Stub:
    """As much of a CUDA tensor as a row looks at."""

    device = torch.device("cuda", 0)
    dtype = torch.float32


@pytest.mark.parametrize(
    ("name", "module", "reason"),
    [
        ("triton", None, "triton is not installed"),
        ("triton", type(sys)("triton"), "found 3.5.1, wanted 3.6 or newer"),
        ("nf4lora.triton_kernels", None, "nf4lora.triton_kernels does not load"),
    ],
)
def test_why_there_is_no_triton(monkeypatch, name, module, reason):
    if module:
        module.__version__ = "3.5.1"
    if name != "triton":
        for loaded in [m for m in sys.modules if m.startswith(name + ".")]:
            monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(triton_rows, "kernels", triton_rows.kernels.__wrapped__)
    assert reason in triton_rows.why_not()
    with pytest.raises(NotImplementedError, match=reason):
        ops.quantize(torch.zeros(64), 64, "nf4")


def test_launch_parameters_are_whole_blocks():
    for blocksize in BLOCKSIZES:
        config = triton_tiles.triton_quantize(blocksize)
        assert config.weights % blocksize == 0 and config.weights & (config.weights - 1) == 0
    for numel in (1, 2**20, 2**40):
        assert triton_tiles.triton_dequantize(numel).weights <= 256 * 32  # the blocks of one nested absmax


# ---- the puzzle, on a CPU with a schedule of its own


@backends.use_backend("reference")  # with a GPU, Triton takes no CPU tensors
def test_the_puzzle_checks_before_it_times():
    from bench import puzzle

    def schedule(weight):
        return reference.dequantize(*weight.arguments)

    shapes = ((2, 3, 64, 128, torch.bfloat16), (1, 5, 32, 64, torch.float32))
    rows = puzzle.run(10, "cpu", {"fake": schedule, "nf4lora cpu": lambda w: puzzle.ours("cpu", w)}, shapes)
    assert [r["schedule"] for r in rows] == ["fake", "nf4lora cpu"] * 2
    assert all(r["iterations"] == 10 and r["seconds"] > 0 and r["speedup"] > 0 for r in rows)
    assert [r["speedup"] for r in rows if r["schedule"] == "fake"] == [1.0, 1.0]
    with pytest.raises(AssertionError):
        puzzle.run(1, "cpu", {"wrong": lambda w: schedule(w) * 1.01}, shapes)
    with pytest.raises(AssertionError):
        puzzle.run(1, "cpu", {"transposed": lambda w: schedule(w).t().contiguous().t()}, shapes)
