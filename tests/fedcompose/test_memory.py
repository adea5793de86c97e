"""Large pieces come from memory that was freed before."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

COPIES = """
import resource, sys
from fedcompose.memory import reuse_freed_memory
if sys.argv[1] == "reused":
    reuse_freed_memory()
piece = bytes(5 << 20)
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    bytes(bytearray(piece))
before = faults()
for _ in range(20):
    bytes(bytearray(piece))
print(faults() - before)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library is not glibc")
def test_copies_of_a_chunk_cost_no_page_faults() -> None:
    """As it is, the negative control, each copy is new memory, 1,280 pages of it."""

    def faults(memory: str) -> int:
        done = subprocess.run([sys.executable, "-c", COPIES, memory], stdout=subprocess.PIPE, check=True)
        return int(done.stdout)

    assert faults("returned") > 20 * 1280
    assert faults("reused") < 1280
