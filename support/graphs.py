"""A function of tensors, replayed as a CUDA graph for each set of shapes that it is called with."""
import torch
from torch import Tensor


class Graphed:
    """`function(*tensors)` on tensors of few different shapes; `state` are tensors that it changes beside what it returns.

    On CUDA the first call of a shape warms up and captures, which runs the function, so `state` is put back; every call copies its inputs into
    the graph's own and replays it. What is returned is overwritten by the next call of the same shapes. Elsewhere it is just called.
    """
    def __init__(self, function, *state: Tensor):
        self.function, self.state, self.graphs, self.pool = function, state, {}, None

    def __call__(self, *tensors: Tensor) -> Tensor:
        shapes = tuple(tuple(tensor.shape) for tensor in tensors)
        if not tensors[0].is_cuda:
            self.graphs.setdefault(shapes, 0)
            return self.function(*tensors)
        if shapes not in self.graphs:
            self.graphs[shapes] = self.capture([tensor.clone() for tensor in tensors])
        graph, inputs, output = self.graphs[shapes]
        for own, tensor in zip(inputs, tensors):
            own.copy_(tensor, non_blocking=True)
        graph.replay()
        return output

    def capture(self, inputs: list[Tensor]):
        kept, stream = [tensor.clone() for tensor in self.state], torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self.function(*inputs)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            output = self.function(*inputs)
        self.pool = self.pool or graph.pool()
        for tensor, value in zip(self.state, kept):
            tensor.copy_(value)
        return graph, inputs, output
