"""Forward and backward of a detector as CUDA graphs: one launch each, where the processor would launch thousands.

A GPU of today computes the kernels of one or two images faster than Python and torch can launch them. A graph is
recorded for one size of batch, so batches are padded to multiples of GRAIN pixels, and each size met is recorded once.

# B image, H and W height and width of the padded batch
"""

import contextlib
import gc
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from framework.data.batch import padded_side
from framework.models.detector import Detector, Predictions
from framework.processes import without_collector

GRAIN = 64  # pixels
MOST_GRAPHS = 192  # of the sizes met last, some 15 MiB each; multi-scale training at published sizes meets fewer


class Graphs:
    """Takes the place of `detector.forward` where it trains; evaluation is as before.

    Results are those of the batch padded so far, with the same draws of dropout. All graphs share the memory of
    activations: a backward pass has to come before the next forward pass, else RuntimeError. Before a size is recorded
    it is computed once without a graph, beside that memory: it has to be there twice, which the first recording tries.
    Weights have to stay where they are (ZeRO 0 to 2), and parameters and buffers the objects they are now; where their
    memory moved, graphs are recorded anew.

    compile_layers: what is recorded of encoder and decoder layers are kernels that torch.compile makes, for a batch of
    any height and width: fewer passes over memory. Dropout then draws other numbers.
    Source: the scheme of torch.cuda.make_graphed_callables, for many sizes, and for weights that hooks wait for.
    """

    def __init__(self, detector: Detector, *, compile_layers: bool = False) -> None:
        self.detector, self.run = detector, detector.forward
        layers = [*detector.encoder.layers, *detector.decoder.layers] if compile_layers else []
        self.compiled = [(layer, torch.compile(layer.forward, dynamic=True)) for layer in layers]
        self.state = [*detector.parameters(), *detector.buffers()]
        self.weights = [weight for weight in detector.parameters() if weight.requires_grad]
        self.gradients: Tensor | None = None  # of all weights; every graph writes them there
        self.addresses: list[int] = []
        self.recorded: OrderedDict[Any, _Recorded] = OrderedDict()
        self.passes = 0  # forward passes so far
        self.images: Tensor | None = None  # room for those of the largest batch so far; graphs read them there
        self.pool: Any = None
        self.stream: torch.cuda.Stream | None = None  # one: memory that was freed on it is used again on it only
        detector.forward = self.forward  # type: ignore[method-assign]

    def forward(self, images_B3HW: Tensor, padding_BHW: Tensor | None = None) -> Predictions:
        if not (self.detector.training and torch.is_grad_enabled() and images_B3HW.is_cuda):
            return self.run(images_B3HW, padding_BHW)
        addresses = [one.data_ptr() for one in self.state]
        if addresses != self.addresses:
            self.recorded.clear()
            self.addresses, self.pool = addresses, torch.cuda.graph_pool_handle()
            self.stream = self.stream or torch.cuda.Stream(images_B3HW.device)
            self.gradients = torch.empty(sum(map(Tensor.numel, self.weights)), device=images_B3HW.device)
        shape, padded = padded_shape(images_B3HW)
        masked = padded or padding_BHW is not None or bool(self.compiled)  # without a mask they are others
        lower = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
        key = shape, masked, lower
        graphs = self.recorded.pop(key, None) or self._record(*key, device=images_B3HW.device)
        self.recorded[key] = graphs
        if len(self.recorded) > MOST_GRAPHS:
            self.recorded.popitem(last=False)
        fill(images_B3HW, padding_BHW, graphs.images_B3HW, graphs.padding_BHW)
        self.passes += 1
        return as_predictions(_Replay.apply(self, graphs, *self.weights))

    def _record(self, shape: tuple[int, ...], masked: bool, lower: torch.dtype | None, device: torch.device) -> Any:
        assert self.gradients is not None
        if self.images is None or math.prod(shape) > len(self.images):
            self.images = torch.zeros(math.prod(shape), device=device)
        images_B3HW = self.images[: math.prod(shape)].view(shape)
        padding_BHW = torch.zeros(shape[0], *shape[2:], dtype=torch.bool, device=device) if masked else None

        def run() -> tuple[list[Tensor], list[Tensor]]:
            leaves = [weight.detach().requires_grad_() for weight in self.weights]
            lowered = torch.autocast("cuda", lower or torch.float32, enabled=lower is not None, cache_enabled=False)
            with lowered, in_place_of(self.weights, leaves, self.detector), computing_with(self.compiled):
                return as_tensors(self.run(images_B3HW, padding_BHW)), leaves

        return _Recorded(run, images_B3HW, padding_BHW, self.gradients, self.weights, self.pool, self.stream,
                         first=not self.recorded)  # fmt: skip


@contextlib.contextmanager
def in_place_of(weights: Sequence[Tensor], leaves: Sequence[Tensor], module: nn.Module) -> Iterator[None]:
    """The module computes with these leaves, which have the weights' memory: nothing of the weights' hooks, nor of the
    stream they were made on, may enter a graph. (torch.func.functional_call does not give tied weights back.)"""
    leaf_of = {id(weight): leaf for weight, leaf in zip(weights, leaves, strict=True)}
    places = [(one._parameters, name) for one in module.modules() for name in one._parameters]
    before = [parameters[name] for parameters, name in places]
    try:
        for (parameters, name), weight in zip(places, before, strict=True):
            parameters[name] = leaf_of.get(id(weight), weight)  # type: ignore[assignment]
        yield
    finally:
        for (parameters, name), weight in zip(places, before, strict=True):
            parameters[name] = weight


@contextlib.contextmanager
def computing_with(forwards: Sequence[tuple[nn.Module, Callable[..., Tensor]]]) -> Iterator[None]:
    """Modules compute with these functions instead of their `forward`."""
    try:
        for module, forward in forwards:
            module.forward = forward
        yield
    finally:
        for module, _ in forwards:
            del module.forward


class _Recorded:
    """The two graphs of one size; inputs, outputs and gradients are in memory that stays where it is."""

    def __init__(
        self, run: Callable[[], tuple[list[Tensor], list[Tensor]]], images_B3HW: Tensor, padding_BHW: Tensor | None,
        gradients: Tensor, weights: Sequence[Tensor], pool: Any, aside: Any, *, first: bool,
    ) -> None:  # fmt: skip
        self.images_B3HW, self.padding_BHW, self.gradients, self.weights = images_B3HW, padding_BHW, gradients, weights
        device = images_B3HW.device
        draws = torch.cuda.get_rng_state(device)
        warm_up(run, aside)
        self.forward, self.backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        # thread_local: other threads (the loader's, NCCL's) go on as they like.
        settings: dict[str, Any] = {"pool": pool, "stream": aside, "capture_error_mode": "thread_local"}
        gc.collect()  # graphs that are no longer used must not be freed while others are recorded
        with without_collector():
            with torch.cuda.graph(self.forward, **settings):
                outputs, leaves = run()
            self.output_gradients = [torch.zeros_like(one) for one in outputs]
            with torch.cuda.graph(self.backward, **settings):
                found = torch.autograd.grad(outputs, leaves, self.output_gradients, allow_unused=True)
                places = torch._utils._unflatten_dense_tensors(gradients, weights)
                pairs = [(place, one) for place, one in zip(places, found, strict=True) if one is not None]
                torch._foreach_copy_([place for place, _ in pairs], [one for _, one in pairs])
        self.used = [one is not None for one in found]
        self.outputs = [one.detach() for one in outputs]
        if first:
            warm_up(run, aside)
        torch.cuda.set_rng_state(draws, device)


def warm_up(run: Callable[[], tuple[list[Tensor], list[Tensor]]], stream: Any) -> None:
    """Libraries are loaded, and choose their kernels, before: neither can be recorded."""
    stream.wait_stream(torch.cuda.current_stream(stream.device))
    with torch.cuda.stream(stream):
        outputs, leaves = run()
        torch.autograd.grad(outputs, leaves, [torch.zeros_like(one) for one in outputs], allow_unused=True)
    torch.cuda.current_stream(stream.device).wait_stream(stream)


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, owner: Graphs, graphs: _Recorded, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.owner, ctx.graphs, ctx.number = owner, graphs, owner.passes
        graphs.forward.replay()
        return tuple(output.clone() for output in graphs.outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        graphs = ctx.graphs
        if ctx.number != ctx.owner.passes:
            raise RuntimeError("engine.cuda_graphs: the backward pass of a forward pass that another one has followed, "
                               "whose activations took its memory; set engine.cuda_graphs=false")  # fmt: skip
        torch._foreach_copy_(graphs.output_gradients, gradients)
        graphs.backward.replay()
        # A copy: until they are summed up or sent, the next micro-batch would write over them.
        found = torch._utils._unflatten_dense_tensors(graphs.gradients.clone(), graphs.weights)
        return None, None, *(one if used else None for one, used in zip(found, graphs.used, strict=True))


def padded_shape(images_B3HW: Tensor) -> tuple[tuple[int, ...], bool]:
    """Its shape, sides rounded up to multiples of GRAIN, and whether that is another one."""
    *others, height, width = images_B3HW.shape
    shape = (*others, padded_side(height, GRAIN), padded_side(width, GRAIN))
    return shape, shape != tuple(images_B3HW.shape)


def fill(images: Tensor, padding: Tensor | None, to_images: Tensor, to_padding: Tensor | None) -> None:
    """A batch into the upper left corner of a larger one (B, 3, H, W), and of its mask (B, H, W), True beside it."""
    height, width = images.shape[-2:]
    if images.shape != to_images.shape:
        to_images.zero_()
    to_images[..., :height, :width] = images
    if to_padding is not None:
        to_padding.fill_(True)
        to_padding[:, :height, :width] = False if padding is None else padding


def as_tensors(predictions: Predictions) -> list[Tensor]:
    proposals = as_tensors(predictions.proposals) if predictions.proposals is not None else []
    return [predictions.logits_KBQC, predictions.boxes_KBQ4, *proposals]


def as_predictions(tensors: Sequence[Tensor]) -> Predictions:
    logits_KBQC, boxes_KBQ4, *proposals = tensors
    return Predictions(logits_KBQC, boxes_KBQ4, as_predictions(proposals) if proposals else None)
