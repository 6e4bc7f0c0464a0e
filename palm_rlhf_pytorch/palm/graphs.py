"""CUDA graphs for a step that is repeated: launched once as a whole, where its kernels alone would wait for the host.

https://pytorch.org/blog/accelerating-pytorch-with-cuda-graphs/
A graph replays the same kernels on the same memory: the step must keep all that changes in tensors it writes in place,
and ask the device for nothing. Knows nothing of what the step does.
"""

from collections.abc import Callable

import torch


class StepGraphs:
    """Calls a step; on CUDA from a graph, one for each span of the cache that it reads.

    The first call for a span runs as it is, which also readies the libraries' workspaces; the second is captured.
    """

    def __init__(self, step: Callable[[int], None], device: torch.device) -> None:
        self.step, self.on_cuda = step, device.type == "cuda"
        self.seen: set[int] = set()
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}

    def __call__(self, span: int) -> None:
        """Take the step once."""
        if span in self.seen and self.on_cuda:
            self._replay(span)
        else:
            self.seen.add(span)
            self.step(span)

    def _replay(self, span: int) -> None:
        if span not in self.graphs:
            pool = next(iter(self.graphs.values())).pool() if self.graphs else None
            graph = torch.cuda.CUDAGraph()
            # thread_local: other threads may go on using the device meanwhile
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                self.step(span)
            self.graphs[span] = graph
        self.graphs[span].replay()
