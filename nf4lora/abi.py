"""csrc/params.h and csrc/api.h in ctypes: the same structs, the same fields, the same order (tests/test_native.py compares)."""

from ctypes import Structure, c_double, c_float, c_int32, c_int64, c_void_p

_I, _L, _P, _D = c_int32, c_int64, c_void_p, c_double


class Weight(Structure):
    _fields_ = [("packed", _P), ("absmax", _P), ("nested_absmax", _P), ("offset", _P), ("rows", _L), ("cols", _L),
                ("blocksize", _L), ("nested_blocksize", _L), ("quant_type", _I)]  # fmt: skip


class QuantizeParams(Structure):
    _fields_ = [("a", _P), ("packed", _P), ("absmax", _P), ("numel", _L), ("blocksize", _L), ("dtype", _I),
                ("quant_type", _I), ("workers", _I)]  # fmt: skip


class QuantizeAbsmaxParams(Structure):
    _fields_ = [("absmax", _P), ("offset", _P), ("codes", _P), ("nested_absmax", _P), ("nblocks", _L),
                ("nested_blocksize", _L)]  # fmt: skip


class DequantizeParams(Structure):
    _fields_ = [("w", Weight), ("out", _P), ("dtype", _I), ("workers", _I)]


class Dropout(Structure):
    _fields_ = [("seed", _P), ("p", c_float)]


class LinearConfig(Structure):
    _fields_ = [("path", _I), ("block_m", _I), ("block_n", _I), ("block_k", _I), ("threads", _I)]


MAX_GROUP = 3


class Member(Structure):
    _fields_ = [("w", Weight), ("bias", _P), ("lora_A", _P), ("lora_B", _P), ("dA", _P), ("dB", _P), ("dy", _P),
                ("ld_dy", _L), ("r", _L), ("scaling", c_float)]  # fmt: skip


class LinearFwdParams(Structure):
    _fields_ = [("w", Weight), ("x", _P), ("bias", _P), ("lora_A", _P), ("lora_B", _P), ("y", _P), ("xa", _P),
                ("M", _L), ("r", _L), ("ld_y", _L), ("ld_xa", _L), ("scaling", c_float), ("x_dtype", _I), ("bias_dtype", _I),
                ("A_dtype", _I), ("B_dtype", _I), ("dropout", Dropout), ("config", LinearConfig)]  # fmt: skip


class LinearBwdParams(Structure):
    _fields_ = [("member", Member * MAX_GROUP), ("dyb", _P), ("dx", _P), ("count", _L), ("M", _L), ("dy_dtype", _I),
                ("A_dtype", _I), ("dropout", Dropout), ("config", LinearConfig)]  # fmt: skip


class LoraBwdParams(Structure):
    _fields_ = [("dy", _P), ("x", _P), ("xa", _P), ("lora_B", _P), ("dyb", _P), ("dA", _P), ("dB", _P), ("M", _L),
                ("N", _L), ("K", _L), ("r", _L), ("ld_dy", _L), ("ld_xa", _L), ("ld_dyb", _L), ("scaling", c_float),
                ("dtype", _I), ("A_dtype", _I), ("B_dtype", _I), ("dropout", Dropout), ("config", LinearConfig)]  # fmt: skip


class SwigluParams(Structure):
    _fields_ = [("gate_up", _P), ("dh", _P), ("out", _P), ("M", _L), ("N", _L), ("dtype", _I), ("workers", _I)]


class CudaConfig(Structure):
    _fields_ = [("path", _I), ("tokens", _I), ("rows", _I), ("split", _I)]


COUNTERS = 1 << 14  # kCounters


class GroupFwdParams(Structure):
    _fields_ = [("member", Member * MAX_GROUP), ("x", _P), ("y", _P), ("xa", _P), ("x_ext", _P), ("decoded", _P),
                ("workspace", _P), ("counters", _P), ("count", _L), ("M", _L), ("N", _L), ("K", _L), ("r", _L),
                ("ld", _L), ("x_dtype", _I), ("bias_dtype", _I), ("A_dtype", _I), ("B_dtype", _I),
                ("dropout", Dropout), ("config", CudaConfig)]  # fmt: skip


class GroupBwdParams(Structure):
    _fields_ = [("member", Member * MAX_GROUP), ("dy", _P), ("dyb", _P), ("dx", _P), ("decoded", _P), ("workspace", _P),
                ("counters", _P), ("count", _L), ("M", _L), ("N", _L), ("K", _L), ("r", _L), ("ld", _L),
                ("dy_dtype", _I), ("A_dtype", _I), ("dropout", Dropout), ("config", CudaConfig)]  # fmt: skip


class GroupLoraBwdParams(Structure):
    _fields_ = [("member", Member * MAX_GROUP), ("x", _P), ("xa", _P), ("dyb", _P), ("dy_ext", _P), ("dx", _P),
                ("workspace", _P), ("counters", _P), ("count", _L), ("M", _L), ("N", _L), ("K", _L), ("r", _L),
                ("ld", _L), ("dtype", _I), ("A_dtype", _I), ("B_dtype", _I), ("split", _I), ("dropout", Dropout)]  # fmt: skip


class OptimTensor(Structure):
    _fields_ = [("param", _P), ("grad", _P), ("numel", _L), ("offset", _L), ("hyper", _I), ("slot", _I)]


class OptimHyper(Structure):
    _fields_ = [("lr", _D), ("beta1", _D), ("beta2", _D), ("eps", _D), ("weight_decay", _D), ("step", _L)]


class OptimParams(Structure):
    _fields_ = [("tensors", _P), ("hypers", _P), ("state1", _P), ("state2", _P), ("absmax1", _P), ("absmax2", _P),
                ("steps", _P), ("flag", _P), ("count", _L), ("hyper_count", _L), ("seed", _L), ("origin", _L),
                ("stochastic", _I), ("dtype", _I), ("kind", _I), ("workers", _I)]  # fmt: skip


class OptimCheckParams(Structure):
    _fields_ = [("tensors", _P), ("steps", _P), ("flag", _P), ("counters", _P), ("count", _L), ("dtype", _I),
                ("workers", _I)]  # fmt: skip


# nf4lora_cpu_<name> -> its argument
FUNCTIONS = {
    "quantize": QuantizeParams,
    "quantize_absmax": QuantizeAbsmaxParams,
    "dequantize": DequantizeParams,
    "linear_fwd": LinearFwdParams,
    "linear_bwd": LinearBwdParams,
    "lora_bwd": LoraBwdParams,
    "swiglu_fwd": SwigluParams,
    "swiglu_bwd": SwigluParams,
    "optim_step": OptimParams,
    "optim_check": OptimCheckParams,
}

# nf4lora_cuda_<name>, which take a stream beside it
CUDA_FUNCTIONS = {
    name: FUNCTIONS[name] for name in ("quantize", "quantize_absmax", "dequantize", "optim_step", "optim_check")
} | {
    "linear_fwd": GroupFwdParams,
    "linear_bwd": GroupBwdParams,
    "lora_bwd": GroupLoraBwdParams,
    "swiglu_fwd": SwigluParams,
    "swiglu_bwd": SwigluParams,
}
