"""CUDA graphs for a step that is repeated: launched once as a whole, where its kernels alone would wait for the host.

https://pytorch.org/blog/accelerating-pytorch-with-cuda-graphs/
A graph replays the same kernels on the same memory: the step must keep all that changes in tensors it writes in place,
and ask the device for nothing. Knows nothing of what the step does.
"""

from collections.abc import Callable
from threading import Lock

import torch

STEPS_WORTH_A_GRAPH = 8  # to capture a step waits for the device, and takes as long as a few steps
CAPTURING = Lock()  # a process can capture one graph at a time


class StepGraphs:
    """Calls a step; on CUDA from a graph, one for each span of the cache that it reads.

    The first call for a span runs as it is, which also readies the libraries' workspaces; the second is captured, if
    enough are still to come.
    """

    def __init__(self, step: Callable[[int], None], device: torch.device) -> None:
        self.step, self.device = step, device
        self.seen: set[int] = set()
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}

    def __call__(self, span: int, *, left: int) -> None:
        """Take the step once; `left` counts the steps of this span from this one on."""
        if span in self.graphs:
            self.graphs[span].replay()
        elif self.device.type == "cuda" and span in self.seen and left >= STEPS_WORTH_A_GRAPH:
            self.graphs[span] = self._capture(span)
            self.graphs[span].replay()
        else:
            self.seen.add(span)
            self.step(span)

    def _capture(self, span: int) -> torch.cuda.CUDAGraph:
        pool = next(iter(self.graphs.values())).pool() if self.graphs else None
        graph = torch.cuda.CUDAGraph()
        with CAPTURING, torch.cuda.device(self.device):
            stream = torch.cuda.Stream()  # torch's own for captures belongs to whichever device came first
            # thread_local: other threads may go on using the device meanwhile
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                self.step(span)
        return graph
