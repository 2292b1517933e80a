"""Run tensor-parallel ranks as processes that share memory."""

import time

import torch.multiprocessing


def run_ranks(function, arguments, size, seconds=300):
    """Run `function(rank, *arguments)` in `size` processes. Raise AssertionError if one still runs after `seconds`."""
    ranks = torch.multiprocessing.spawn(function, arguments, size, join=False)
    deadline = time.monotonic() + seconds
    while not (done := ranks.join(1)) and time.monotonic() < deadline:
        pass
    for process in ranks.processes:
        process.kill()
    assert done, f"a rank still waits after {seconds} s"
