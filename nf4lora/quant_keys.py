"""bitsandbytes' checkpoint keys and the fields of `QuantState`, one into the other. Files are not trusted: every value
is checked against a literal list or a range, and nothing is imported or looked up by a name from a file."""

import json
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .codebook import NESTED_BLOCKSIZE, QUANT_TYPES, codebook

if TYPE_CHECKING:
    from .quant_state import QuantState

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MAX_JSON_BYTES = 1 << 20
_JSON_KEY = "bitsandbytes__"
_TENSORS = {"absmax", "quant_map"}
_NESTED_TENSORS = {"nested_absmax", "nested_quant_map"}


def write(state: "QuantState", packed: bool) -> dict[str, Any]:
    device = state.absmax.device
    # + 0.0 turns FP4's -0.0 into the 0.0 that bitsandbytes writes there.
    tensors = {"absmax": state.absmax, "quant_map": state.code + 0.0}
    meta = {
        "quant_type": state.quant_type,
        "blocksize": state.blocksize,
        "dtype": str(state.dtype).removeprefix("torch."),
        "shape": tuple(state.shape),
    }
    if state.nested:
        tensors["nested_absmax"] = state.nested_absmax
        tensors["nested_quant_map"] = codebook("dynamic", device).clone()
        meta["nested_blocksize"] = state.nested_blocksize
        meta["nested_dtype"] = "float32"
        meta["nested_offset"] = state.offset.item()
    if not packed:
        return meta | tensors
    text = torch.frombuffer(bytearray(json.dumps(meta).encode()), dtype=torch.uint8)
    return tensors | {f"quant_state.{_JSON_KEY}{state.quant_type}": text.to(device)}


def read(quant_dict: dict[str, Any], device: torch.device | str | None) -> dict[str, Any]:
    found = {str(key).rsplit(".", 1)[-1]: value for key, value in quant_dict.items()}
    if len(found) != len(quant_dict):
        raise ValueError(f"quant state: found the keys of more than one tensor: {sorted(map(str, quant_dict))}")
    json_keys = [key for key in found if key.startswith(_JSON_KEY)]
    if len(json_keys) > 1:
        raise ValueError(f"quant state: found {sorted(json_keys)}, wanted one of them")
    tensors = {key: found.pop(key) for key in _TENSORS | _NESTED_TENSORS if key in found}
    meta = _parse(json_keys[0], found.pop(json_keys[0])) | found if json_keys else found
    if json_keys and found:
        raise ValueError(f"quant state: unknown keys {sorted(found)}")
    nested = "nested_absmax" in tensors
    if missing := ({"absmax", "nested_absmax"} if "nested_offset" in meta else {"absmax"}) - tensors.keys():
        raise ValueError(f"quant state: missing {sorted(missing)}; found {sorted(map(str, quant_dict))}")
    fields = _fields(meta, nested)
    for key, table in (("quant_map", fields["quant_type"]), ("nested_quant_map", "dynamic")):
        if key in tensors and not _same(tensors[key], codebook(table)):
            raise ValueError(f"{key}: found other values than the {table} table, which is the only one supported")
    for key in ("absmax", "nested_absmax") if nested else ("absmax",):
        if not isinstance(tensors[key], Tensor):
            raise TypeError(f"{key}: found {type(tensors[key]).__name__}, wanted a tensor")
        statistics = tensors[key].to(device=device)
        fields[key] = statistics.float() if statistics.dtype in (torch.float16, torch.bfloat16) else statistics
    if nested:
        fields["offset"] = torch.tensor(fields["offset"], dtype=torch.float32, device=fields["absmax"].device)
    return fields


def _parse(key: str, data: Tensor) -> dict[str, Any]:
    if not isinstance(data, Tensor) or data.dtype != torch.uint8 or data.numel() > MAX_JSON_BYTES:
        raise ValueError(f"{key}: wanted the bytes of a JSON object in a uint8 tensor of at most {MAX_JSON_BYTES}")
    try:
        meta = json.loads(bytes(data.cpu().reshape(-1).tolist()))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{key}: not a JSON object: {error}") from error
    if not isinstance(meta, dict):
        raise ValueError(f"{key}: found a JSON {type(meta).__name__}, wanted an object")
    if meta.get("quant_type") != key.removeprefix(_JSON_KEY):
        raise ValueError(f"{key}: its JSON says quant_type {meta.get('quant_type')!r}")
    return meta


def _fields(meta: dict[str, Any], nested: bool) -> dict[str, Any]:
    wanted = {"quant_type", "blocksize", "dtype", "shape"} | ({"nested_offset"} if nested else set())
    if missing := wanted - meta.keys():
        raise ValueError(f"quant state: missing {sorted(missing)}; found {sorted(meta)}")
    if unknown := meta.keys() - wanted - {"nested_blocksize", "nested_dtype"}:
        raise ValueError(f"quant state: unknown keys {sorted(unknown)}")
    dtype = DTYPES.get(str(meta["dtype"]).removeprefix("torch."))
    if dtype is None:
        raise ValueError(f"dtype: found {meta['dtype']!r}, wanted one of {tuple(DTYPES)}")
    # its table is a file of that name
    if not isinstance(meta["quant_type"], str) or meta["quant_type"] not in QUANT_TYPES:
        raise ValueError(f"quant_type: found {meta['quant_type']!r}, wanted one of {QUANT_TYPES}")
    shape = meta["shape"]
    if not isinstance(shape, (list, tuple)) or not all(type(d) is int and 0 <= d < 2**63 for d in shape):
        raise ValueError(f"shape: found {shape!r}, wanted a list of sizes")
    if math.prod(shape) >= 2**63:
        raise ValueError(f"shape: {shape!r} has 2**63 elements or more")
    fields = {"quant_type": meta["quant_type"], "blocksize": meta["blocksize"], "dtype": dtype, "shape": shape}
    if nested:
        offset = meta["nested_offset"]
        if type(offset) not in (int, float) or not abs(offset) <= torch.finfo(torch.float32).max:
            raise ValueError(f"nested_offset: found {offset!r}, wanted a finite number")
        if meta.get("nested_dtype", "float32") != "float32":
            raise ValueError(f"nested_dtype: found {meta['nested_dtype']!r}, wanted 'float32'")
        fields |= {"offset": float(offset), "nested_blocksize": meta.get("nested_blocksize", NESTED_BLOCKSIZE)}
    return fields


def _same(found: Any, table: Tensor) -> bool:
    return isinstance(found, Tensor) and found.shape == table.shape and torch.equal(found.float().cpu(), table)
