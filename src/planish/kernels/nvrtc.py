"""CUDA C++ compiled while the program runs, by the compiler that comes with torch (NVRTC): no toolkit is needed.

    load_kernel(compile_source(source, {"BITS": 2}, "sm_90"), "gemv") -> a kernel of the current device, for `launch`

Both libraries are called through their C interfaces, which don't change: libnvrtc, and the driver that torch runs on.
A kernel that may `overlap` starts before the one ahead of it in its stream has ended, and waits for it itself
(programmatic dependent launch, sm_90 and later). Knows nothing of what it compiles.
"""

import ctypes
import functools
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

PLAIN_SHARED = 48 * 1024  # shared memory that a kernel has without asking
MAX_SHARED = 8  # the driver's numbers of a function's attribute,
CLUSTER, OVERLAPS = 4, 6  # of a launch's,
SWIZZLE_128, PROMOTE_128 = 3, 2  # of a tensor map's parts,
KINDS = {torch.int8: 0, torch.float16: 6, torch.bfloat16: 9}  # and of what is in it


class _Attribute(ctypes.Structure):
    _fields_ = [("kind", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_longlong * 8)]


class _Launch(ctypes.Structure):
    _fields_ = [
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("count", ctypes.c_uint),
    ]


@functools.cache
def compiler() -> ctypes.CDLL | None:
    """libnvrtc of torch's CUDA version: the one that torch has loaded, else the one its wheels brought."""
    if torch.version.cuda is None:
        return None
    name = f"libnvrtc.so.{torch.version.cuda.split('.')[0]}"
    found = importlib.util.find_spec("nvidia")
    roots = [] if found is None else [Path(root) for root in found.submodule_search_locations or ()]
    for path in [name, *(str(path) for root in roots for path in sorted(root.glob(f"*/lib/{name}")))]:
        try:
            return ctypes.CDLL(path)
        except OSError:
            continue
    return None


@functools.cache
def targets() -> frozenset[str]:
    """Real architectures that the compiler knows, as 'sm_90'; none without a compiler."""
    nvrtc, count = compiler(), ctypes.c_int()
    if nvrtc is None or nvrtc.nvrtcGetNumSupportedArchs(ctypes.byref(count)):
        return frozenset()
    numbers = (ctypes.c_int * count.value)()
    nvrtc.nvrtcGetSupportedArchs(numbers)
    return frozenset(f"sm_{number}" for number in numbers)


def compile_source(source: str, macros: Mapping[str, int], target: str, nvrtc: ctypes.CDLL | None = None) -> bytes:
    """Machine code of CUDA C++ that includes nothing.

    Args:
        source: its text.
        macros: defined for it.
        target: such as 'sm_90'.
        nvrtc: the compiler, if not torch's own.
    Raises:
        RuntimeError: with the compiler's words.
    """
    nvrtc = nvrtc or compiler()
    assert nvrtc is not None
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    options = [f"--gpu-architecture={target}", "--std=c++17", *(f"-D{name}={value}" for name, value in macros.items())]
    given = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"planish.cu", 0, None, None)
    try:
        if nvrtc.nvrtcCompileProgram(program, len(options), given):
            nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
            text = ctypes.create_string_buffer(size.value)
            nvrtc.nvrtcGetProgramLog(program, text)
            raise RuntimeError(f"a kernel doesn't compile for {target}: {text.value.decode()}")
        nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size))
        code = ctypes.create_string_buffer(size.value)
        nvrtc.nvrtcGetCUBIN(program, code)
        return code.raw
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


@functools.cache
def _library() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def _driver() -> ctypes.CDLL:
    """The driver, with torch's context: a thread has none until something of torch's needs it."""
    driver, context, device = _library(), ctypes.c_void_p(), ctypes.c_int()
    _check(driver.cuCtxGetCurrent(ctypes.byref(context)))
    if not context:
        _check(driver.cuDeviceGet(ctypes.byref(device), torch.cuda.current_device()))
        _check(driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device))
        _check(driver.cuCtxSetCurrent(context))
    return driver


def _check(status: int) -> None:
    if status:
        words = ctypes.c_char_p()
        _library().cuGetErrorString(status, ctypes.byref(words))
        raise RuntimeError(f"CUDA driver: {(words.value or b'unknown error').decode()}")


def load_kernel(code: bytes, name: str, shared: int = 0) -> ctypes.c_void_p:
    """A kernel of compiled code, on the current device, that may take `shared` bytes of shared memory."""
    driver, module, kernel = _driver(), ctypes.c_void_p(), ctypes.c_void_p()
    _check(driver.cuModuleLoadData(ctypes.byref(module), code))
    _check(driver.cuModuleGetFunction(ctypes.byref(kernel), module, name.encode()))
    if shared > PLAIN_SHARED:
        _check(driver.cuFuncSetAttribute(kernel, MAX_SHARED, shared))
    return kernel


def tensor_map(x: torch.Tensor, rows: int, columns: int) -> ctypes.Array:
    """Of a contiguous [n, m] of one of KINDS, for copies of [rows, columns], which are 128 bytes wide and swizzled.

    What a copy takes from outside is zero. The tensor starts at, and has rows of, a multiple of 16 bytes.
    """
    size = x.element_size()
    assert x.is_contiguous() and x.data_ptr() % 16 == 0 and x.shape[1] * size % 16 == 0 and columns * size == 128
    return _tensor_map(x.data_ptr(), x.shape[0], x.shape[1], x.dtype, rows)


@functools.lru_cache(1024)
def _tensor_map(address: int, height: int, width: int, dtype: torch.dtype, rows: int) -> ctypes.Array:
    room = ctypes.create_string_buffer(192)
    made = (ctypes.c_char * 128).from_buffer(room, -ctypes.addressof(room) % 64)  # it lies at a multiple of 64
    sizes, strides = (ctypes.c_uint64 * 2)(width, height), (ctypes.c_uint64 * 1)(dtype.itemsize * width)
    box, every = (ctypes.c_uint32 * 2)(128 // dtype.itemsize, rows), (ctypes.c_uint32 * 2)(1, 1)
    at = ctypes.c_void_p(address)
    status = _driver().cuTensorMapEncodeTiled(
        made, KINDS[dtype], 2, at, sizes, strides, box, every, 0, SWIZZLE_128, PROMOTE_128, 0
    )
    _check(status)
    return made


def _launch_attributes(cluster: int, overlap: bool) -> list[_Attribute]:
    attributes = []
    if cluster > 1:
        attributes.append(_Attribute(kind=CLUSTER, value=(ctypes.c_longlong * 8)(cluster | 1 << 32, 1)))
    if overlap:
        attributes.append(_Attribute(kind=OVERLAPS, value=(ctypes.c_longlong * 8)(1)))
    return attributes


def launch(
    kernel: ctypes.c_void_p,
    grid: tuple[int, int],
    threads: int,
    shared: int,
    arguments: Sequence[torch.Tensor | int | float | None | ctypes.Array],
    overlap: bool = False,
    cluster: int = 1,
) -> None:
    """Run a kernel on the current device and stream, its blocks in clusters.

    A tensor is given as its address, None as a null one, an array as it is.
    """
    values = [_argument(value) for value in arguments]
    places = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
    attributes = _launch_attributes(cluster, overlap)
    config = _Launch(
        grid=(ctypes.c_uint * 3)(*grid, 1),
        block=(ctypes.c_uint * 3)(threads, 1, 1),
        shared=shared,
        stream=torch.cuda.current_stream().cuda_stream,
        attributes=(_Attribute * 2)(*attributes),
        count=len(attributes),
    )
    _check(_driver().cuLaunchKernelEx(ctypes.byref(config), kernel, places, None))


def _argument(value: torch.Tensor | int | float | None | ctypes.Array) -> Any:
    if isinstance(value, int):
        return ctypes.c_int(value)
    if isinstance(value, float):
        return ctypes.c_float(value)
    if isinstance(value, ctypes.Array):
        return value
    return ctypes.c_void_p(None if value is None else value.data_ptr())
