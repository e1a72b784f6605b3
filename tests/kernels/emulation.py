"""Builds CUDA kernels for a CPU (cuda_emulator.h, emulate_*.cpp) with the system's C++ compiler, and finds NVRTC."""

import ctypes
import importlib.util
import shutil
import subprocess
from pathlib import Path

import pytest

from planish.kernels import nvrtc


def builder(folder, name):
    """A function of a kernel's text and macros: the library that emulate_`name`.cpp makes of it, built once."""
    if not shutil.which("g++"):
        pytest.skip("needs g++")
    driver = Path(__file__).with_name(f"emulate_{name}.cpp")

    def build(source, macros):
        out = folder / f"{'_'.join(str(value) for value in macros.values())}.so"
        if not out.exists():
            kernel = out.with_suffix(".cu")
            kernel.write_text(source)
            defined = [f"-D{macro}={value}" for macro, value in macros.items()]
            command = ["g++", "-std=c++17", "-O1", "-w", "-shared", "-fPIC", "-DEMULATED", *defined]
            subprocess.run([*command, f'-DKERNEL="{kernel}"', str(driver), "-o", str(out)], check=True)
        return ctypes.CDLL(str(out))

    return build


def some_nvrtc():
    """Torch's own, or one that lies in a wheel beside it; None without either."""
    if nvrtc.compiler():
        return nvrtc.compiler()
    found = importlib.util.find_spec("nvidia")
    roots = [] if found is None else list(found.submodule_search_locations or ())
    paths = [path for root in roots for path in Path(root).glob("*/lib/libnvrtc.so.*")]
    return ctypes.CDLL(str(paths[0])) if paths else None
