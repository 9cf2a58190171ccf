"""NF4 and FP4 in Triton: eight codes of a 32-bit word to float32 and back, exact, and the absmax they are scaled by.

All numbers come from `nf4lora.codebook`, read at import; `nf4lora.reference` says what must come out.
The only Triton file with inline asm. A table of 16 values or 32 cells lies across the lanes of a warp, and one `shfl`
asks a lane for its entry: 6 instructions a weight for all of dequantize, where loads from a table in memory take 9 and
byte permutations of one in registers 12 (sm_90, bfloat16; bench/codegen_triton.py counts). ASM=False, for the
interpreter, which knows no asm, takes the loads. Every lane of a warp must be there: nothing here may be called inside a
branch that a warp takes in part.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..codebook import MIN_ABSMAX, NESTED_BLOCKSIZE, boundaries, code_order

# One PTX instruction: (operation, destination, operands); an operand is a name or a number.
Instruction = tuple[str, str, tuple[str | int, ...]]
_WORDS, _SUMS = 4, 8  # that one asm statement takes: a lane's part of the table is loaded once for them all


def decode_program() -> tuple[Instruction, ...]:
    """Of words w0 … w3 and the address of 16 values, `table`: element e of word w into `v<e>_<w>`, bits of a float32.

    Lane l holds value l % 16. `shfl.idx` looks at five bits of an index, the fifth of which is the next code's and does
    no harm, as lanes 16 apart hold the same. Element 2j is the high nibble of byte j. Source: PTX ISA, shfl.sync.
    """
    program: list[Instruction] = [
        ("mov.u32", "lane", ("%laneid",)),
        ("and.b32", "lane", ("lane", 15)),
        ("mad.wide.u32", "address", ("lane", 4, "table")),
        ("ld.global.nc.b32", "value", ("[address]",)),
    ]
    for word in range(_WORDS):
        for nibble in range(8):
            program.append(("shr.u32", "index", (f"w{word}", 4 * nibble)))
            program.append(("shfl.sync.idx.b32", f"v{nibble ^ 1}_{word}", ("value", "index", 31, 0xFFFFFFFF)))
    return tuple(program)


def encode_program() -> tuple[Instruction, ...]:
    """Of sums s0 … s7 and the address of `cells`, `table`: halves of the entries of their cells, `upper<i>` and `lower<i>`."""
    program: list[Instruction] = [
        ("mov.u32", "lane", ("%laneid",)),
        ("mad.wide.u32", "address", ("lane", 8, "table")),
        ("ld.global.nc.b32", "lower", ("[address]",)),
        ("ld.global.nc.b32", "upper", ("[address+4]",)),
    ]
    for i in range(_SUMS):
        program.append(("shfl.sync.idx.b32", f"upper{i}", ("upper", f"s{i}", 31, 0xFFFFFFFF)))
        program.append(("shfl.sync.idx.b32", f"lower{i}", ("lower", f"s{i}", 31, 0xFFFFFFFF)))
    return tuple(program)


def _text(program: tuple[Instruction, ...], outputs: list[str], inputs: list[str]) -> str:
    number = {name: f"${i}" for i, name in enumerate([*outputs, *inputs, "table"])}
    scratch = sorted({target for _, target, _ in program} - set(number))
    lines = [f".reg .b{64 if name == 'address' else 32} {name};" for name in scratch]
    for operation, target, operands in program:
        lines.append(f"{operation} {number.get(target, target)}, {', '.join(number.get(o, str(o)) for o in operands)};")
    return "\n".join(["{", *lines, "}"])


# `inline_asm_elementwise` numbers all outputs of the first result before those of the second, then its arguments.
_DECODE = tl.constexpr(_text(
    decode_program(), [f"v{e}_{w}" for e in range(8) for w in range(_WORDS)], [f"w{w}" for w in range(_WORDS)],
))  # fmt: skip
_ENCODE = tl.constexpr(_text(
    encode_program(), [f"{half}{i}" for half in ("upper", "lower") for i in range(_SUMS)], [f"s{i}" for i in range(_SUMS)],
))  # fmt: skip
_DECODE_CONSTRAINTS = tl.constexpr(",".join(["=&f"] * 8 * _WORDS + ["r"] * _WORDS + ["l"] * _WORDS))
_ENCODE_CONSTRAINTS = tl.constexpr(",".join(["=&f"] * _SUMS + ["=&r"] * _SUMS + ["f"] * _SUMS + ["l"] * _SUMS))
_DECODE_PACK, _ENCODE_PACK = tl.constexpr(_WORDS), tl.constexpr(_SUMS)


@triton.jit
def decode(words, codebook_ptr, ASM: tl.constexpr):
    """int32 [W], eight codes each -> eight float32 [W], elements 0 to 7. codebook_ptr: float32 [16]."""
    if ASM:
        table = tl.broadcast_to(codebook_ptr.to(tl.int64), words.shape)
        return tl.inline_asm_elementwise(
            _DECODE, _DECODE_CONSTRAINTS, [words, table], dtype=(tl.float32,) * 8, is_pure=True, pack=_DECODE_PACK
        )
    else:
        return (
            tl.load(codebook_ptr + ((words >> 4) & 15)), tl.load(codebook_ptr + (words & 15)),
            tl.load(codebook_ptr + ((words >> 12) & 15)), tl.load(codebook_ptr + ((words >> 8) & 15)),
            tl.load(codebook_ptr + ((words >> 20) & 15)), tl.load(codebook_ptr + ((words >> 16) & 15)),
            tl.load(codebook_ptr + ((words >> 28) & 15)), tl.load(codebook_ptr + ((words >> 24) & 15)),
        )  # fmt: skip


@triton.jit
def load_absmax(absmax_ptr, nested_absmax_ptr, offset_ptr, dynamic_ptr, first, blocks, mask):
    """float32 absmax of blocks first + blocks, all of one group of 256; first int64, blocks int32 [...].

    Nested (nested_absmax_ptr is not None): dynamic[code] * nested_absmax + offset, two roundings.
    """
    absmax = tl.load(absmax_ptr + first + blocks, mask=mask)
    if nested_absmax_ptr is None:
        return absmax
    else:
        scale = tl.load(nested_absmax_ptr + first // _NESTED_BLOCKSIZE)
        return tl.load(dynamic_ptr + absmax.to(tl.int32), mask=mask) * scale + tl.load(offset_ptr)


@triton.jit
def to_float32(x):
    """Exact. bfloat16 by its bits, as Triton's interpreter has its denormals wrong."""
    if x.dtype == tl.bfloat16:
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


@triton.jit
def scaled(x):
    """float32 [B, n, 8], blocks of 8n -> each divided by its absmax, and absmax float32 [B]. NaN > Inf > any number.

    As the reference has it: times the reciprocal of max(absmax, MIN_ABSMAX), both rounded once.
    """
    magnitude = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    absmax = tl.max(tl.max(magnitude, axis=2), axis=1).to(tl.float32, bitcast=True)
    # tl.full, as Triton 3.6 takes a literal below 2**-126 for a float64; tl.where, as tl.maximum loses a NaN
    least = tl.full(absmax.shape, _MIN_ABSMAX, tl.float32)
    reciprocal = tl.div_rn(tl.full(absmax.shape, 1.0, tl.float32), tl.where(absmax < least, least, absmax))
    return x * reciprocal[:, None, None], absmax


@triton.jit
def encode(v, cells_ptr, NF4: tl.constexpr, ASM: tl.constexpr):
    """float32, at most an ulp beyond [-1, 1] or NaN -> int32 code of #{boundaries < v}, for NaN of 15. cells_ptr: `cells`.

    v falls into cell round(14 v), the low bits of 14 v + 1.5 * 2**23, and the one boundary there is left to compare with.
    The sum is monotone in v and no boundary lies near the edge of a cell, so the count is exact however the sum rounds.
    FP4 has three boundaries in its middle cell: two of them are compared with by name.
    """
    per_unit, magic = tl.full(v.shape, _CELLS_PER_UNIT, tl.float32), tl.full(v.shape, _CELL_MAGIC, tl.float32)
    cell = tl.fma(v, per_unit, magic)
    if ASM:
        table = tl.broadcast_to(cells_ptr.to(tl.int64), v.shape)
        boundary, rank = tl.inline_asm_elementwise(
            _ENCODE, _ENCODE_CONSTRAINTS, [cell, table], dtype=(tl.float32, tl.int32), is_pure=True, pack=_ENCODE_PACK
        )
        # The sign of the difference, exact; that of a NaN, always 0x7fffffff on the device, is 0.
        rank += ((boundary - v).to(tl.uint32, bitcast=True) >> 31).to(tl.int32)
    else:
        entry = tl.load(cells_ptr + (cell.to(tl.int32, bitcast=True) & 31))
        rank = entry.to(tl.int32) + (v > (entry >> 32).to(tl.int32).to(tl.float32, bitcast=True)).to(tl.int32)
    if NF4:
        return rank
    else:
        rank += (v > _FP4_LEFT_OF_ZERO).to(tl.int32) + (v > _FP4_RIGHT_OF_ZERO).to(tl.int32)
        return ((tl.full(v.shape, _FP4_CODES, tl.int64) >> (4 * rank).to(tl.int64)) & 15).to(tl.int32)


CELLS_PER_UNIT = 14
# The outer two of the three boundaries in FP4's middle cell: its least magnitude, 0 and -0 are that close.
_LEFT, _, _RIGHT = (v for v in boundaries("fp4").tolist() if abs(v * CELLS_PER_UNIT) < 0.5)


def scales(*tensors: Tensor | None) -> list[Tensor | None]:
    """absmax, nested_absmax and offset as kernels take them: what came as int32 holds the bits of float32."""
    return [t.view(torch.float32) if t is not None and t.dtype == torch.int32 else t for t in tensors]


@cache
@torch.inference_mode(False)  # a cached tensor outlives the mode it is first asked for in
def cells(quant_type: str, device: torch.device | str = "cpu") -> Tensor:
    """Table of `encode`, int64 [32], for cells -16 to 15: a cell's boundary, float32 bits, above the count of all lower ones.

    Cells that no number falls into hold (inf, 15), for NaN: on the device its sum is 0x7fffffff, in the interpreter
    0x7fc00000 or 0xffc00000.
    Raises: ValueError where a codebook does not suit the cells.
    """
    listed = [v for v in boundaries(quant_type).tolist() if quant_type == "nf4" or v not in (_LEFT, _RIGHT)]
    cell = [round(v * CELLS_PER_UNIT) for v in listed]
    if len(set(cell)) < len(cell) or any(abs(v * CELLS_PER_UNIT - c) > 0.49 for v, c in zip(listed, cell, strict=True)):
        raise ValueError(f"{quant_type}: two boundaries in one cell of 1/{CELLS_PER_UNIT}, or one at the edge of its cell")
    table = []
    for number in range(-16, 16):
        reached = abs(number) <= CELLS_PER_UNIT
        boundary = dict(zip(cell, listed, strict=True)).get(number, torch.inf)
        bits = int(torch.tensor(boundary, dtype=torch.float32, device="cpu").view(torch.int32))
        table.append((bits << 32) | (sum(c < number for c in cell) if reached else 15))
    return torch.tensor(table, dtype=torch.int64, device="cpu").to(device)


_MIN_ABSMAX = tl.constexpr(MIN_ABSMAX)
_NESTED_BLOCKSIZE = tl.constexpr(NESTED_BLOCKSIZE)
_CELLS_PER_UNIT = tl.constexpr(float(CELLS_PER_UNIT))
_CELL_MAGIC = tl.constexpr(1.5 * 2.0**23 + 16)  # its sums have an ulp of 1, and cell + 16 in their low bits
_FP4_LEFT_OF_ZERO, _FP4_RIGHT_OF_ZERO = tl.constexpr(_LEFT), tl.constexpr(_RIGHT)
_FP4_CODES = tl.constexpr(sum(code << (4 * rank) for rank, code in enumerate(code_order("fp4").tolist())))
