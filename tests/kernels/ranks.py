"""Run tensor-parallel ranks as processes that share memory."""

import time

import torch.multiprocessing

from nanovllm.ops.comm import collectives, overlapped_all_reduce
from tests.kernels.interpreter import patch_language_once_per_launch


def run_ranks(function, arguments, size, seconds=300):
    """Run `function(rank, *arguments)` in `size` processes. Raise AssertionError if one still runs after `seconds`."""
    # Ranks are forked from a process that has imported this module. Importing takes longer than most of what they do.
    torch.multiprocessing.set_forkserver_preload([__name__])
    ranks = torch.multiprocessing.start_processes(
        _run_rank, (function, *arguments), size, join=False, start_method="forkserver"
    )
    deadline = time.monotonic() + seconds
    while not (done := ranks.join(1)) and time.monotonic() < deadline:
        pass
    for process in ranks.processes:
        process.kill()
    assert done, f"a rank still waits after {seconds} s"


def _run_rank(rank, function, *arguments):
    patch_language_once_per_launch()
    for module in (collectives, overlapped_all_reduce):
        module.poll_host = _sleep_before(module.poll_host)
    function(rank, *arguments)


def _sleep_before(poll):
    """Return `poll`, but let other ranks have the core first: there may be fewer cores than ranks."""

    def sleep_and_poll(tries, *arguments):
        time.sleep(0.001 * min(tries, 20))
        poll(tries, *arguments)

    return sleep_and_poll
