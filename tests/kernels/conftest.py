"""What tests of Triton's kernels share.

Without a GPU they run in Triton's interpreter, in a process of their own: Triton reads TRITON_INTERPRET when it is
imported.
"""

import os
import subprocess
import sys

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture
def interpreted(request):
    """What pytest prints of this file's GPU tests, which must pass in the interpreter."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", "gpu", str(request.path)]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout


@pytest.fixture
def compiler():
    """torch.compile for a test that counts on it: it compiles one function so often only, over all tests."""
    torch._dynamo.reset()
    yield torch.compile
    torch._dynamo.reset()


@pytest.fixture(autouse=INTERPRETED)
def interpreter_counts(monkeypatch):
    """Triton's interpreter makes a loop's bounds plain numbers in a way that NumPy 2.4 refuses."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patched)
