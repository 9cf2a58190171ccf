"""Triton kernels of nf4lora, installed as `nf4lora.triton_kernels`: the bare name belongs to another project."""

if __name__ == "triton_kernels":
    raise ImportError("import nf4lora.triton_kernels; the top-level name triton_kernels belongs to another project")
