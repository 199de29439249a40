"""A function of tensors, replayed as a CUDA graph for each set of shapes that it is called with."""

import torch
from torch import Tensor


class Graphed:
    """`function(*tensors)` on tensors of few different shapes.

    `state` are tensors that the function changes beside what it returns. On CUDA the first call of
    a shape warms up and captures. This runs the function, so `state` is put back. Every call copies
    its inputs into the graph's own and replays it; what it returns is overwritten by the next call
    of the same shapes. Elsewhere the function is just called.
    """

    def __init__(self, function, *state: Tensor):
        self.function = function
        self.state = state
        self.graphs = {}  # shapes -> (graph, inputs, output); on other devices shapes -> 0
        self.pool = None  # memory that all graphs share
        self.stream = None  # to warm up and capture on, the same for all that share memory

    def __call__(self, *tensors: Tensor) -> Tensor:
        shapes = tuple(tuple(tensor.shape) for tensor in tensors)
        if not tensors[0].is_cuda:
            self.graphs.setdefault(shapes, 0)
            return self.function(*tensors)
        with torch.cuda.device(tensors[0].device):
            if shapes not in self.graphs:
                self.graphs[shapes] = self.capture([tensor.clone() for tensor in tensors])
            graph, inputs, output = self.graphs[shapes]
            for own, tensor in zip(inputs, tensors):
                own.copy_(tensor)
            graph.replay()
        return output

    def capture(self, inputs: list[Tensor]):
        """The graph of one set of shapes, with its own inputs and output."""
        kept = [tensor.clone() for tensor in self.state]
        self.stream = stream = self.stream or torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self.function(*inputs)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # other threads, such as NCCL's watchdog, may query events meanwhile
        with torch.cuda.graph(graph, self.pool, stream, capture_error_mode="thread_local"):
            output = self.function(*inputs)
        self.pool = self.pool or graph.pool()
        for tensor, value in zip(self.state, kept):
            tensor.copy_(value)
        return graph, inputs, output
