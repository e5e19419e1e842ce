"""The cap on the CPU, each case in a process of its own: a limit must not outlive its test."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="RLIMIT_DATA counts mappings on Linux only"
)

PRELUDE = """
import torch
from edgetrain.targets import keep_freed_blocks, keeps_freed_blocks, release_free_memory, return_large_blocks
from edgetrain.targets import select_target
from edgetrain.units import MIB
torch.set_num_threads(2)
target = select_target("cpu")

def fails(call):
    try:
        call()
    except Exception as error:
        assert target.is_out_of_memory(error), repr(error)
        return True
    return False
"""


def run(body: str) -> str:
    done = subprocess.run([sys.executable, "-c", PRELUDE + body], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_overrun_is_caught_and_the_process_goes_on_below_the_cap():
    run("""
target.cap(200 * MIB)
assert fails(lambda: torch.empty(300 * MIB, dtype=torch.uint8))
held = torch.zeros(150 * MIB, dtype=torch.uint8)
assert fails(lambda: torch.zeros(100 * MIB, dtype=torch.uint8))
del held
for _ in range(3):
    assert not fails(lambda: torch.zeros(150 * MIB, dtype=torch.uint8))
assert fails(lambda: bytearray(300 * MIB))
target.uncap()
assert not fails(lambda: torch.zeros(300 * MIB, dtype=torch.uint8))
""")


def test_second_cap_replaces_the_first_and_uncap_restores_what_stood_before():
    run("""
import resource
before = resource.getrlimit(resource.RLIMIT_DATA)
target.cap(50 * MIB)
target.cap(300 * MIB)
assert not fails(lambda: torch.zeros(200 * MIB, dtype=torch.uint8))
target.uncap()
target.uncap()
assert resource.getrlimit(resource.RLIMIT_DATA) == before
""")


CONVOLUTIONS = """
import threading
conv = torch.nn.Conv2d
net = torch.nn.Sequential(
    conv(16, 32, 3, padding=1), torch.nn.BatchNorm2d(32), torch.nn.ReLU(), conv(32, 32, 3, padding=1),
    conv(32, 17, 5, padding=2), torch.nn.Flatten(), torch.nn.Linear(17 * 256, 10),
)

def step(n):
    net(torch.randn(n, 16, 16, 16)).square().sum().backward()
    net.zero_grad()

def attempt(n, budget_bytes):
    failed = []
    def capped():
        target.cap(budget_bytes)
        failed.append(fails(lambda: step(n)))
        net.zero_grad()
        target.uncap()
    thread = threading.Thread(target=capped)
    thread.start()
    thread.join()
    return failed[0]

step(2)
return_large_blocks()
"""


def test_convolutions_on_two_threads_fail_with_an_error():
    """A batch whose activations pass the cap fails in torch's allocator, and a smaller one runs afterwards."""
    run(
        CONVOLUTIONS
        + """
for _ in range(3):
    target.cap(128 * MIB)
    assert fails(lambda: step(2048))
    net.zero_grad()
    assert not fails(lambda: step(64))
    target.uncap()
"""
    )


def test_onednn_recovers_in_a_new_thread():
    """Its code generator keeps the first error of a thread: later primitives fail there, whatever memory is left."""
    run(
        CONVOLUTIONS
        + """
assert all(attempt(128, budget_kib * 1024) for budget_kib in range(1024, 12 * 1024, 977))
assert not attempt(64, 256 * MIB)
"""
    )


def test_cap_starts_the_threads_that_could_not_start_below_it():
    """Without a warm-up, libgomp would end the process at the first parallel region."""
    run("""
target.cap(1 * MIB)
torch.zeros(2**17).add_(1)
""")


def test_resident_growth_stays_below_the_cap():
    run("""
return_large_blocks()
target.start()
target.cap(256 * MIB)
blocks = []
while not fails(lambda: blocks.append(torch.ones(MIB, dtype=torch.uint8))):
    pass
assert len(blocks) >= 250, len(blocks)
# code of libraries that is touched for the first time is resident, too, but no data: the error path has some MiB
assert 250 * MIB < target.peak_bytes() < 272 * MIB, target.peak_bytes()
""")


def test_threshold_keeps_freed_blocks_out_of_the_heap():
    """Blocks of 1 to 40 MiB, at most four at a time: the heap's holes cost more than what lives."""
    body = """
import random
if FIXED:
    assert return_large_blocks()
draw = random.Random(0)
release_free_memory()
target.start()
live, small, exact = [], [], 0
for size in [*range(1, 41)] * 3:
    live.append(torch.ones(size * MIB // 4))
    small.append(torch.ones(20_000))
    exact = max(exact, sum(t.nbytes for t in live + small))
    if len(live) > 3:
        live.pop(draw.randrange(3))
    if len(small) > 50:
        small.pop(draw.randrange(50))
print(target.peak_bytes() / exact)
"""
    grown, fixed = (float(run(f"FIXED = {choice}\n{body}")) for choice in (False, True))
    print(f"resident / allocated: {grown:.2f} with the dynamic threshold, {fixed:.2f} with a fixed one")
    assert grown > 1.5
    assert fixed < 1.1


def test_a_step_that_repeats_has_no_page_faults_where_freed_blocks_are_kept():
    """Until memory is to go back: then every block is a mapping again, and what is free is gone."""
    faults = run("""
import resource

def step():
    blocks = [torch.ones(n * MIB // 4) for n in (3, 40, 9, 70, 1)]
    return sum(block.nbytes for block in blocks)

pins = []  # small blocks above large ones: the end of the heap is not all that is free

def faults():
    blocks = [torch.ones(n * MIB // 4) for n in (3, 40, 9, 70, 1)]
    pins.append(torch.ones(100))
    del blocks
    for _ in range(5):  # an aligned block asks for more than it takes: what it leaves does not hold another one
        step()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    nbytes = step()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / (nbytes / 4096)

before = target.current_bytes()
assert not keeps_freed_blocks()
assert return_large_blocks()
returned = faults()
assert keep_freed_blocks()
assert keeps_freed_blocks()
kept, held = faults(), target.current_bytes() - before
assert return_large_blocks()
assert not keeps_freed_blocks()
release_free_memory()
print(returned, kept, held / MIB, (target.current_bytes() - before) / MIB)
""")
    returned, kept, held, left = map(float, faults.split())
    assert 100 * kept < returned  # large pages make both few
    assert held > 120
    assert left < 20
