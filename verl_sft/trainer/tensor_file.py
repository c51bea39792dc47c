"""Tensors as the bytes of a safetensors file, straight from their memory.

The library's own writer copies all of them into one buffer first, and leaves the file unsynced and
unhashed, so that it has to be read again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

_NAMES = {  # in the order of their tensors in a file
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_ORDER = list(_NAMES)
_ALIGN = 8  # bytes, of the header; wide elements first then keep every tensor aligned


def file_parts(
    tensors: Mapping[str, Tensor], *, check: Callable[[str, Tensor], None] | None = None
) -> Iterator[memoryview]:
    """The bytes that `safetensors` would write, in order; they share the tensors' memory.

    Args:
        tensors: by name, contiguous, on the CPU.
        check: looks at each tensor just before its bytes are given out.
    """
    order = sorted(tensors, key=lambda name: (_ORDER.index(tensors[name].dtype), name))
    header: dict[str, object] = {}
    end = 0
    for name in order:
        tensor, start = tensors[name], end
        end += tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGN)
    yield memoryview(len(text).to_bytes(8, "little") + text)
    for name in order:
        if check is not None:
            check(name, tensors[name])
        yield tensors[name].reshape(-1).view(torch.uint8).numpy().data
