"""Quantize and dequantize on the host, beside bitsandbytes and beside a copy of the same bytes.

Bytes moved, for n weights of 2 bytes: quantize reads 2n and writes n/2; dequantize reads n/2 and writes 2n.
"""

import bitsandbytes.functional as bnb
import torch

from nf4lora import functional

from .harness import compare, report

SHAPE = (4096, 4096)


def main() -> None:
    torch.manual_seed(0)
    w = torch.randn(SHAPE, dtype=torch.bfloat16)
    packed, state = functional.quantize_4bit(w, compress_statistics=True)
    bnb_packed, bnb_state = bnb.quantize_4bit(w, quant_type="nf4", compress_statistics=True)
    read, written = torch.empty(w.numel() // 2, dtype=torch.uint8), torch.empty_like(w)

    def same_bytes() -> None:
        ours, ours_state = functional.quantize_4bit(w)
        theirs, theirs_state = bnb.quantize_4bit(w, quant_type="nf4")
        assert torch.equal(ours, theirs) and torch.equal(ours_state.absmax, theirs_state.absmax)

    def same_values() -> None:
        ours, ours_state = functional.quantize_4bit(w)
        assert torch.equal(functional.dequantize_4bit(ours, ours_state), bnb.dequantize_4bit(*bnb.quantize_4bit(w, quant_type="nf4")))

    def copy() -> None:
        read.add_(1)
        written.zero_()

    size = "x".join(map(str, SHAPE))
    rows = compare(
        f"quantize {size} bf16, NF4 + double quantization",
        {
            "nf4lora": lambda: functional.quantize_4bit(w, compress_statistics=True),
            "bitsandbytes": lambda: bnb.quantize_4bit(w, quant_type="nf4", compress_statistics=True),
        },
        same_bytes,
        rounds=7,
    )
    rows += compare(
        f"dequantize {size} bf16, NF4 + double quantization",
        {
            "nf4lora": lambda: functional.dequantize_4bit(packed, state),
            "bitsandbytes": lambda: bnb.dequantize_4bit(bnb_packed, bnb_state),
            "read n/2 bytes, write 2n": copy,
        },
        same_values,
    )
    report("cpu_quantize", rows)


if __name__ == "__main__":
    main()
