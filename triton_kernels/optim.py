"""optim_step and optim_check in Triton, one launch for all parameters: programs find theirs, and its address, in a table."""

from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from ..codebook import codebook, dynamic_boundaries
from ..reference_optim import HYPERS, STATE_BLOCKSIZE, constants
from ..triton_tiles import TritonConfig
from .nf4 import scaled, to_float32
from .weight import rounded

# Words before a table's columns. A step's: the seed and the index that the stochastic rounding's counter begins at; a check's:
# zeros, the first of which its programs count in.
_HEAD_WORDS = tl.constexpr(2)
_CONSTANTS_EACH = tl.constexpr(9)


@triton.jit
def _share(program, numel_ptr, begins_ptr, count, halvings, WEIGHTS: tl.constexpr):
    """A program's (tensor, first element int64, how many of it are left, at most WEIGHTS), the columns `_table`'s."""
    tensor = program * 0  # the last that begins at this program or before
    for halving in range(halvings):
        probe = tensor + (1 << (halvings - 1 - halving))
        begins = tl.load(begins_ptr + probe, mask=probe < count, other=1 << 40)
        tensor = tl.where(begins <= program, probe, tensor)
    first = (program - tl.load(begins_ptr + tensor)) * WEIGHTS
    return tensor, first, tl.minimum(tl.load(numel_ptr + tensor) - first, WEIGHTS).to(tl.int32)


@triton.jit
def _counted(bits_ptr, count, step):
    """root and step_size as `reference_optim.constants` has them, to the bit, of a step counted on the device, int32.

    bits_ptr: of a float64 lr, and count and twice as many words on of beta1 and beta2.
    """
    lr = tl.load(bits_ptr).to(tl.float64, bitcast=True)
    a = tl.load(bits_ptr + count).to(tl.float64, bitcast=True)
    b = tl.load(bits_ptr + 2 * count).to(tl.float64, bitcast=True)
    of_a, of_b = tl.full([], 1.0, tl.float64), tl.full([], 1.0, tl.float64)
    while step > 0:  # their powers
        if step & 1:
            of_a, of_b = of_a * a, of_b * b
        a, b, step = a * a, b * b, step >> 1
    return tl.sqrt(1.0 - of_b).to(tl.float32), (lr / (1.0 - of_a)).to(tl.float32)


@triton.jit
def _read(state_ptr, absmax_ptr, codebook_ptr, index, block, mask, is_block):
    """float32 [B, n, 8], anything where masked. Codes where there is an absmax, of `codebook_ptr`'s values."""
    if absmax_ptr is None:
        return tl.load(state_ptr + index, mask=mask, other=0.0)
    else:
        code = tl.load(state_ptr + index, mask=mask, other=0).to(tl.int32)
        return tl.load(codebook_ptr + code) * tl.load(absmax_ptr + block, mask=is_block, other=0.0)[:, None, None]


@triton.jit
def _cell(v):
    """int32 [...], 0 … 4095: the sign of v, NaN or in [-1.01, 1.01], and the exponent and first 7 bits of |v| + 2**-14.

    The maps are as fine as their values are small, and so are floating-point numbers: a cell has one boundary at most that
    numbers of the cell lie above. The sum may round, but it never turns the order of two v around. NaN's cells are beyond 1's.
    """
    sign = v.to(tl.uint32, bitcast=True) & 0x80000000
    biased = (v + (sign | 0x38800000).to(tl.float32, bitcast=True)).to(tl.uint32, bitcast=True)
    return (((biased >> 31) << 11) | ((biased >> 16) & 2047)).to(tl.int32)


@triton.jit
def _write(v, state_ptr, absmax_ptr, cells_ptr, index, block, mask, is_block):
    """As `_read` finds it: code = #{boundaries < v * (1 / absmax)}, the exact nearest of 256; 255 for NaN."""
    if absmax_ptr is None:
        tl.store(state_ptr + index, v, mask=mask)
    else:
        v, absmax = scaled(tl.where(mask, v, 0.0))
        entry = tl.load(cells_ptr + _cell(v))
        boundary = (entry >> 32).to(tl.int32).to(tl.float32, bitcast=True)
        code = entry.to(tl.int32) + tl.where(v <= boundary, 0, 1)  # NaN goes up
        tl.store(state_ptr + index, code.to(tl.uint8), mask=mask)
        tl.store(absmax_ptr + block, absmax, mask=is_block)


@triton.jit
def _stochastic(v, seed, index, COUNT: tl.constexpr):
    """float32 [B, n, 8] -> one of the two bfloat16 around each; index int64, a multiple of 4, of the first of COUNT.

    Source: nf4lora/reference_optim.py, stochastically_rounded.
    """
    w0, w1, w2, w3 = tl.randint4x(seed, index // 4 + tl.arange(0, COUNT // 4))  # Philox4x32-10
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3)).reshape(v.shape)
    bits = v.to(tl.uint32, bitcast=True)
    up = ((bits + (words >> 16)) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return tl.where((bits & 0x7FFFFFFF) > 0x7F800000, v, up)  # of NaN v; nothing changes Inf


@triton.jit(do_not_specialize=["count", "halvings"], do_not_specialize_on_alignment=["like_ptr"])
def optim_step_kernel(
    like_ptr,  # any of the parameters, for their dtype: float32, bfloat16 or float16
    table_ptr,  # int64, from `_table`: param, grad, numel, offset, first program, hyper; with steps slot and `_bits` too
    constants_ptr,  # float32 [sets, 9], in the order of `reference_optim.constants`; with steps the last two are not read
    state1_ptr,  # float32, or uint8 where there is an absmax1, [arena]
    state2_ptr,  # the same, or None: Lion
    absmax1_ptr,  # float32 [ceil(arena / 256)], or None
    absmax2_ptr,  # the same
    codebook1_ptr,  # float32 [256], or None without codes, as the next three
    codebook2_ptr,
    cells1_ptr,  # int64 [4096], from `cells`
    cells2_ptr,
    steps_ptr,  # int32 [any], by slot, or None, as the next
    flag_ptr,  # int32 [1]: nothing is stored where it is set
    count,  # of tensors
    halvings,  # that find one of them: ceil(log2(count))
    STOCHASTIC: tl.constexpr,
    WHOLE: tl.constexpr,  # parameters and gradients begin at multiples of 16 bytes and have multiples of 8 elements
    ASM: tl.constexpr,
    BLOCK: tl.constexpr,  # elements of a state that share an absmax
    WEIGHTS: tl.constexpr,  # that one program takes of one tensor, a multiple of BLOCK
):
    """One step of AdamW (arXiv:1711.05101) or Lion (arXiv:2302.06675), in place; each operation rounded to float32 on its own.

    Bytes moved, per parameter: 3 of its itemsize, twice that of its states, 8 / 256 for each absmax.
    """
    tl.static_assert(WEIGHTS % BLOCK == 0, "whole blocks")
    program, columns_ptr = tl.program_id(0), table_ptr + _HEAD_WORDS
    tensor, first, left = _share(program, columns_ptr + 2 * count, columns_ptr + 4 * count, count, halvings, WEIGHTS)
    start = tl.multiple_of(tl.load(columns_ptr + 3 * count + tensor), BLOCK) + first  # in the arenas
    param_ptr = tl.load(columns_ptr + tensor).to(like_ptr.dtype)
    grad_ptr = tl.load(columns_ptr + count + tensor).to(like_ptr.dtype)
    if WHOLE:
        param_ptr, grad_ptr = tl.multiple_of(param_ptr, 16), tl.multiple_of(grad_ptr, 16)
    param_ptr, grad_ptr = param_ptr + first, grad_ptr + first
    c_ptr = constants_ptr + tl.load(columns_ptr + 5 * count + tensor) * _CONSTANTS_EACH
    lr, keep, eps = tl.load(c_ptr), tl.load(c_ptr + 1), tl.load(c_ptr + 6)
    beta1, rest1, beta2, rest2 = tl.load(c_ptr + 2), tl.load(c_ptr + 3), tl.load(c_ptr + 4), tl.load(c_ptr + 5)
    if steps_ptr is None:
        root, step_size = tl.load(c_ptr + 7), tl.load(c_ptr + 8)
    else:
        if tl.load(flag_ptr) != 0:
            return
        if state2_ptr is not None:
            step = tl.load(steps_ptr + tl.load(columns_ptr + 6 * count + tensor))
            root, step_size = _counted(columns_ptr + 7 * count + tensor, count, step)

    block = tl.arange(0, WEIGHTS // BLOCK)
    word = block[:, None] * (BLOCK // 8) + tl.arange(0, BLOCK // 8)[None, :]  # [B, 32], eight elements each
    here = 8 * word[:, :, None] + tl.arange(0, 8)[None, None, :]
    mask = tl.broadcast_to((8 * word < left)[:, :, None], here.shape) if WHOLE else here < left
    index, block, is_block = start + here, start // BLOCK + block, block * BLOCK < left

    p = to_float32(tl.load(param_ptr + here, mask=mask, other=0.0)) * keep
    g = to_float32(tl.load(grad_ptr + here, mask=mask, other=0.0))
    m = _read(state1_ptr, absmax1_ptr, codebook1_ptr, index, block, mask, is_block)
    if state2_ptr is None:
        mixed = m * beta1 + g * rest1
        p = p - tl.where(mixed > 0, 1.0, tl.where(mixed < 0, -1.0, 0.0)) * lr  # 0 of NaN
        m = m * beta2 + g * rest2
    else:
        v = _read(state2_ptr, absmax2_ptr, codebook2_ptr, index, block, mask, is_block)
        m = m * beta1 + g * rest1
        v = v * beta2 + (g * rest2) * g
        p = p - tl.div_rn(m, tl.div_rn(tl.sqrt_rn(v), tl.broadcast_to(root, v.shape)) + eps) * step_size
        _write(v, state2_ptr, absmax2_ptr, cells2_ptr, index, block, mask, is_block)
    _write(m, state1_ptr, absmax1_ptr, cells1_ptr, index, block, mask, is_block)
    if STOCHASTIC:
        p = _stochastic(p, tl.load(table_ptr), tl.load(table_ptr + 1) + start, WEIGHTS)
    tl.store(param_ptr + here, rounded(p, like_ptr.dtype.element_ty, ASM), mask=mask)


@triton.jit(do_not_specialize=["count", "halvings"], do_not_specialize_on_alignment=["like_ptr"])
def optim_check_kernel(
    like_ptr,  # any of the gradients, for their dtype: float32, bfloat16 or float16
    table_ptr,  # int64, from `_table`: grad, numel, first program, slot
    steps_ptr,  # int32 [any]
    flag_ptr,  # int32 [1]
    count,  # of tensors
    halvings,  # as `optim_step_kernel` has it
    WHOLE: tl.constexpr,  # the same
    WEIGHTS: tl.constexpr,  # that one program takes of one tensor
):
    """Is any gradient NaN or Inf? The program that comes last of all knows, and counts. Bytes moved: each gradient once."""
    program, columns_ptr = tl.program_id(0), table_ptr + _HEAD_WORDS
    tensor, first, left = _share(program, columns_ptr + count, columns_ptr + 2 * count, count, halvings, WEIGHTS)
    grad_ptr = tl.load(columns_ptr + tensor).to(like_ptr.dtype)
    if WHOLE:
        grad_ptr = tl.multiple_of(grad_ptr, 16)
    word = tl.arange(0, WEIGHTS // 8)[:, None]  # eight elements each
    here = 8 * word + tl.arange(0, 8)[None, :]
    mask = tl.broadcast_to(8 * word < left, here.shape) if WHOLE else here < left
    g = tl.load(grad_ptr + first + here, mask=mask, other=0.0)
    if g.dtype == tl.float32:
        magnitude, infinity = g.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0x7F800000
    else:
        magnitude = g.to(tl.int16, bitcast=True).to(tl.int32) & 0x7FFF
        infinity = 0x7F80 if g.dtype == tl.bfloat16 else 0x7C00
    found = (tl.max(magnitude) >= infinity).to(tl.int64)
    # In one word how many have come, below, and how many of them with something: nothing else passes between programs
    came = tl.atomic_add(table_ptr, 1 + (found << 32), sem="relaxed")
    if (came & 0xFFFFFFFF) == tl.num_programs(0) - 1:
        finite = ((came >> 32) + found == 0).to(tl.int32)
        tl.store(flag_ptr, 1 - finite)
        for begin in range(0, count, 256):
            each = begin + tl.arange(0, 256)
            step_ptr = steps_ptr + tl.load(columns_ptr + 3 * count + each, mask=each < count, other=0)
            tl.store(step_ptr, tl.load(step_ptr, mask=each < count, other=0) + finite, mask=each < count)


def optim_step(
    params: list[Tensor], grads: list[Tensor], state1: Tensor, state2: Tensor | None, absmax1: Tensor | None,
    absmax2: Tensor | None, steps: Tensor | None, flag: Tensor | None, offsets: list[int], slots: list[int],
    hyper_of: list[int], hypers: list[float], kind: str, seed: int | None, origin: int, config: TritonConfig,
) -> None:  # fmt: skip
    """One step of every parameter, in place. Source: nf4lora/reference_optim.py, optim_step."""
    device, grads = state1.device, [g.contiguous() for g in grads]
    numels, addresses = [p.numel() for p in params], [[t.data_ptr() for t in tensors] for tensors in (params, grads)]
    after = (hyper_of,) if steps is None else (hyper_of, slots, *_bits(hypers, hyper_of))
    table, programs = _table((seed or 0, origin), (*addresses, numels, offsets), numels, after, config.weights)
    if programs:
        constants = _constants(hypers, steps is not None)
        codes = ("dynamic", absmax1), ("unsigned_dynamic", absmax2)
        tables = [None if absmax is None else of(code, device) for of in (codebook, cells) for code, absmax in codes]
        with torch.cuda.device_of(state1):
            optim_step_kernel[programs,](
                params[0], _sent(table, device), _sent(constants, device), state1, state2, absmax1, absmax2, *tables, steps, flag,
                len(params), (len(params) - 1).bit_length(), STOCHASTIC=seed is not None, WHOLE=_whole(addresses, numels),
                ASM=isinstance(optim_step_kernel, triton.JITFunction), BLOCK=STATE_BLOCKSIZE, WEIGHTS=config.weights,
                num_warps=config.warps, enable_fp_fusion=False,
            )  # fmt: skip
    torch.autograd.graph.increment_version(params)  # torch's dispatcher does so too, but eager calls go past it


def optim_check(grads: list[Tensor], steps: Tensor, flag: Tensor, slots: list[int], config: TritonConfig) -> None:
    """Source: nf4lora/reference_optim.py, optim_check."""
    grads = [g.contiguous() for g in grads]
    numels, addresses = [g.numel() for g in grads], [[g.data_ptr() for g in grads]]
    table, programs = _table((0, 0), (*addresses, numels), numels, (slots,), config.weights)
    with torch.cuda.device_of(steps):
        optim_check_kernel[max(programs, 1),](  # where all are empty, one that counts
            grads[0], _sent(table, steps.device), steps, flag, len(grads), (len(grads) - 1).bit_length(),
            WHOLE=_whole(addresses, numels), WEIGHTS=config.weights, num_warps=config.warps,
        )  # fmt: skip


def _whole(addresses: list[list[int]], numels: list[int]) -> bool:
    return not any(a % 16 for column in addresses for a in column) and not any(n % 8 for n in numels)


def _table(
    head: tuple[int, int], before: Sequence[list[int]], numels: list[int], after: Sequence[list[int] | np.ndarray], weights: int
) -> tuple[Tensor, int]:  # fmt: skip
    """A kernel's table, with each tensor's first program between the columns given, and how many programs they take together."""
    takes = -(-np.array(numels, np.int64) // weights)
    parts = head, *before, np.cumsum(takes) - takes, *after
    return torch.from_numpy(np.concatenate([np.array(part, np.int64) for part in parts])), int(takes.sum())


@cache
@torch.inference_mode(False)  # a cached tensor outlives the mode it is first asked for in
def cells(code: str, device: torch.device | str = "cpu") -> Tensor:
    """Table of `_write` for an 8-bit map, int64 [4096]: how many boundaries lie below a cell, under the bits of the next.

    Raises: ValueError where a cell would need two boundaries.
    """
    boundaries = dynamic_boundaries("cpu", code)
    cell, after = (_order(t) for t in (boundaries, torch.nextafter(boundaries, torch.tensor(torch.inf, device="cpu"))))
    inside = cell[cell == after]
    if len(inside.unique()) < len(inside):
        raise ValueError(f"{code}: two boundaries in one cell")
    number = torch.arange(4096, device="cpu")
    below = torch.searchsorted(cell, torch.where(number < 2048, number, 2047 - number))
    below[number % 2048 > 15 * 128 + 1] = 254  # beyond 1: NaN, above the last boundary
    listed = torch.cat([boundaries, torch.tensor([torch.inf], device="cpu")]).view(torch.int32).long()
    return (listed[below] << 32 | below).to(device)


def _order(v: Tensor) -> Tensor:
    """int64 [...] that rises as v does: `_cell`, those of negative v below 0."""
    positive = (v.abs() + 2.0**-14).view(torch.int32).long() >> 16 & 2047
    return torch.where(v < 0, -1 - positive, positive)


def _constants(hypers: list[float], counted: bool) -> Tensor:
    """float32 [sets, 9] of `reference_optim.constants`, on the host; of step 1 where steps are counted on the device."""
    sets = np.array(hypers).reshape(-1, len(HYPERS)).tolist()
    cpu = torch.device("cpu")
    found = [constants(*numbers, 1 if counted else int(step), cpu) for *numbers, step in sets]
    return torch.stack([torch.stack(list(c.values())) for c in found])


def _bits(hypers: list[float], hyper_of: list[int]) -> np.ndarray:
    """int64 [3, tensors]: float64 lr, beta1 and beta2 of each."""
    sets = np.array(hypers, np.float64).reshape(-1, len(HYPERS))
    return np.ascontiguousarray(sets[hyper_of, :3].T).view(np.int64)


def _sent(t: Tensor, device: torch.device) -> Tensor:
    """A copy of what lies on the host, which the host does not wait for."""
    return t.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else t
