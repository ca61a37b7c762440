"""What a training step costs each rank under each ZeRO stage: memory and traffic.

The formulas are those of DeepSpeed 0.19.8 (runtime/zero/stage_1_and_2.py, stage3.py, partition_parameters.py) as
ds_config.py sets it up, stage 1 with zero_1.py in it: torch_autocast keeps every weight in float32, so there is no copy
of all weights in 16 bits.
P parameters, T of them trainable, W ranks, B elements of reduce_bucket_size; memory in elements of 4 bytes:

    stage   weights         gradients         buckets              optimizer
    0       P               T                 none                 2 T      moments; the weights are the masters
    1       P               T                 none, or as stage 2  3 T / W  moments and float32 masters
    2       P               T / W, twice if   B each dtype         3 T / W
                            accumulated
    3       P / W + P       T / W             B each dtype, in     3 T / W
                                              that dtype

Buckets are where gradients are collected for a collective: of stage 2 float32 ones, one for each dtype that is sent, of
their full size whatever the model's, twice with overlap_comm; of stage 1 those only where it cannot handle all at once.
Stage 3 gathers weights where they are used and keeps them as long as they are used again within max_reuse_distance
elements: for models of less than half of that, to the end of backward.
"""

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from framework.engine.ds_config import SENT_IN_LOWER_PRECISION, at_once
from framework.models.backbone import convolved_format
from ops.dropout import add_dropout_

STAGES = (0, 1, 2, 3)
OUTSIDE = "images, positions"  # what no child of the detector makes
DROPOUT_OF_ATTENTION = 10  # its place among the arguments of multi_head_attention_forward


class Weight(NamedTuple):
    """A parameter. lower: its layer computes, and DeepSpeed sends it and its gradient, in autocast's dtype."""

    elements: int
    trainable: bool
    lower: bool


def weights_of(model: nn.Module) -> list[Weight]:
    """Each parameter once, also where layers share it."""
    found: dict[nn.Parameter, Weight] = {}
    for module in model.modules():
        lower = type(module) in SENT_IN_LOWER_PRECISION
        for parameter in module.parameters(recurse=False):
            found.setdefault(parameter, Weight(parameter.numel(), parameter.requires_grad, lower))
    return list(found.values())


@dataclass(frozen=True)
class Setup:
    """What the costs depend on beside the stage.

    zero: DeepSpeed's own zero_optimization settings, of which reduce_bucket_size, overlap_comm,
    param_persistence_threshold, max_live_parameters and max_reuse_distance are read. buffers: elements, float32.
    accumulation: micro-batches of a step and rank. lower_bytes: of an element of autocast's dtype, 4 without autocast;
    stage 0 never has one.
    """

    weights: Sequence[Weight]
    buffers: int
    world: int
    accumulation: int
    lower_bytes: int
    recomputed: bool
    offload_optimizer: bool
    zero: Any

    def elements(self, *, trainable: bool = False) -> int:
        return sum(one.elements for one in self.weights if one.trainable or not trainable)

    def sent_bytes(self, weights: Sequence[Weight]) -> int:
        """Of weights, or gradients, in the dtype that each is sent in."""
        return sum(one.elements * (self.lower_bytes if one.lower else 4) for one in weights)

    def share(self, elements: int) -> int:
        return -(-elements // self.world)

    def at_once(self, stage: int) -> bool:
        return at_once(stage, self.zero.overlap_comm, self.offload_optimizer)

    @property
    def kept_until_backward(self) -> bool:
        """Whether stage 3 keeps weights that forward has gathered; between two uses lie at most two passes."""
        parameters = self.elements()
        return 2 * parameters <= self.zero.max_reuse_distance and parameters <= self.zero.max_live_parameters


def memory(stage: int, setup: Setup) -> dict[str, int]:
    """Bytes of one GPU, activations left out: weights, gradients, buckets, optimizer; and host, the CPU's memory.

    Left out too: copies that live while gradients are sent or the weights are updated, when activations are gone: of
    stage 0 all gradients, of stage 1 those of the largest parameter group (with CUDA graphs, whose gradients
    have one memory, of all).
    """
    everything, trainable = setup.elements(), setup.elements(trainable=True)
    weights, gradients, optimizer = everything, trainable, 3 * setup.share(trainable)
    bucket = setup.zero.reduce_bucket_size
    dtypes = {setup.lower_bytes if one.lower else 4 for one in setup.weights if one.trainable}
    buckets = 4 * bucket * len(dtypes) * (2 if setup.zero.overlap_comm else 1)
    if stage == 0:
        optimizer = 2 * trainable
    if stage == 0 or setup.at_once(stage):
        buckets = 0
    if stage == 2:
        gradients = setup.share(trainable) * (2 if setup.accumulation > 1 else 1)
    if stage == 3:
        gathered = everything if setup.kept_until_backward else min(everything, setup.zero.max_live_parameters)
        weights, gradients = sum(setup.share(one.elements) for one in setup.weights) + gathered, setup.share(trainable)
        buckets = bucket * sum(dtypes)
    offloaded = setup.offload_optimizer and stage > 0
    return {
        "weights": 4 * (weights + setup.buffers),
        "gradients": 4 * gradients,
        "buckets": buckets,
        "optimizer": 0 if offloaded else 4 * optimizer,
        "host": 4 * optimizer if offloaded else 0,
    }


class Collective(NamedTuple):
    """times: in a step. bytes: of the whole tensor, each time. sent: bytes that a rank sends in a step, in a ring."""

    name: str
    of: str
    times: int
    bytes: int
    sent: float


def traffic(stage: int, setup: Setup) -> list[Collective]:
    """What a rank sends in one optimizer step.

    A ring of W ranks sends (W - 1) / W of the tensor for a reduce-scatter or an all-gather, and twice that for an
    all-reduce. Source: Rajbhandari et al. 2020, section 7, who count 2 times the weights for stages 0 to 2 and 3 times
    for stage 3. Stages 1 and 2 gather float32 weights; stage 1 scatters float32 gradients, once; stage 2, and stage 1
    where it does not handle them all at once, all-reduces those of layers that compute in lower precision in that
    (DeepSpeed's use_multi_rank_bucket_allreduce), stage 2 for every micro-batch;
    stage 3 gathers once a micro-batch what it keeps until backward, else twice, and three times when layers are
    computed again. Parameters of up to param_persistence_threshold elements are gathered once a step, in float32.
    """

    def ring(name: str, of: str, times: int, size: int) -> Collective:
        passes = 2 if name == "all-reduce" else 1
        return Collective(name, of, times, size, times * passes * size * (setup.world - 1) / setup.world)

    trainable = [one for one in setup.weights if one.trainable]
    updated_bytes = 4 * setup.elements(trainable=True)
    if stage == 0:
        return [ring("all-reduce", "gradients", 1, updated_bytes)]
    if setup.at_once(stage):
        return [ring("reduce-scatter", "gradients", 1, updated_bytes), ring("all-gather", "weights", 1, updated_bytes)]
    if stage < 3:
        times = setup.accumulation if stage == 2 else 1
        return [
            ring("all-reduce", "gradients", times, setup.sent_bytes(trainable)),
            ring("all-gather", "weights", 1, updated_bytes),
        ]
    large = [one for one in setup.weights if one.elements > setup.zero.param_persistence_threshold]
    small = setup.elements() - sum(one.elements for one in large)
    passes = 1 if setup.kept_until_backward else 3 if setup.recomputed else 2
    return [
        ring("reduce-scatter", "gradients", setup.accumulation, setup.sent_bytes(trainable)),
        ring("all-gather", "weights", passes * setup.accumulation, setup.sent_bytes(large)),
        ring("all-gather", "small ones", 1, 4 * small),
    ]


def activations(
    model: nn.Module, size_hw: tuple[int, int], batch: int, dtype: torch.dtype, *, as_on_gpu: bool = True
) -> Counter[str]:
    """Bytes alive after the forward pass of a Detector beside its parameters and buffers, what backward needs, by the
    part of the detector that made them ("backbone", "encoder", ..., or OUTSIDE).

    Nothing is computed: tensors are fakes, whatever device the model is on (meta will do). They are on a fake CPU, as
    torch's CPU build knows no other; as_on_gpu has the operators that differ do what they do on a GPU.

    Args:
        size_hw: of the images, none of it padding. dtype: of autocast; float32 is none.
    """
    named = [*model.named_parameters(), *model.named_buffers()]
    with FakeTensorMode(), _AsOnGPU() if as_on_gpu else contextlib.nullcontext():
        fakes = {name: torch.empty(t.shape, dtype=t.dtype).requires_grad_(t.requires_grad) for name, t in named}
        as_large = torch.bfloat16 if dtype == torch.float16 else dtype  # which no operator of ours takes on a CPU
        return alive_after_forward(model, fakes, size_hw, batch, as_large)


def alive_after_forward(
    model: nn.Module, tensors: dict[str, Tensor], size_hw: tuple[int, int], batch: int, dtype: torch.dtype
) -> Counter[str]:
    """`activations` with these parameters and buffers, by name: really computed when they are no fakes."""
    images, padding = torch.zeros(batch, 3, *size_hw), torch.zeros(batch, *size_hw, dtype=torch.bool)
    with _Storages() as storages, torch.autocast("cpu", dtype, enabled=dtype != torch.float32), storages.parts(model):
        predictions = torch.func.functional_call(model, tensors, (images, padding))
    alive = storages.alive_bytes()
    del predictions  # it holds what was counted
    return alive


class _AsOnGPU(TorchFunctionMode):
    """Where a GPU keeps something else for backward than a CPU.

    Dropout keeps one byte an element there; norms are in float32 under autocast; attention keeps no matrix; maps have
    their channels last.
    """

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is add_dropout_:
            x, residual, p, training = args
            return residual + torch.native_dropout(x, p, training)[0]
        if function is convolved_format:
            return torch.channels_last
        if function in (nn.functional.layer_norm, nn.functional.group_norm):
            return function(args[0].float(), *args[1:], **kwargs)
        if function is nn.functional.multi_head_attention_forward:
            # Without dropout a CPU, too, takes the fused kernel, which keeps inputs, result and sums of rows.
            args = (*args[:DROPOUT_OF_ATTENTION], 0.0, *args[DROPOUT_OF_ATTENTION + 1 :])
        return function(*args, **kwargs)


class _Storages(TorchDispatchMode):
    """Notes the memory of every tensor that an operator returns, that of its inputs in place or as a view, too, and
    the part of the model that it first came from."""

    def __init__(self) -> None:
        super().__init__()
        self.part = OUTSIDE
        self.seen: dict[int, tuple[StorageWeakRef, int, str]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                known = self.seen.get(storage._cdata)
                part = self.part if known is None or known[0].expired() else known[2]
                self.seen[storage._cdata] = StorageWeakRef(storage), storage.nbytes(), part
        return result

    @contextlib.contextmanager
    def parts(self, model: nn.Module) -> Iterator[None]:
        """Inside, what runs within a child of the model is that child's."""
        within = [OUTSIDE]

        def enter(name: str) -> None:
            within.append(name)
            self.part = name

        def leave() -> None:
            within.pop()
            self.part = within[-1]

        with contextlib.ExitStack() as hooks:
            for name, child in model.named_children():
                for called in child if isinstance(child, nn.ModuleList) else [child]:
                    before = called.register_forward_pre_hook(lambda *_, name=name: enter(name))
                    after = called.register_forward_hook(lambda *_: leave())
                    hooks.callback(before.remove)
                    hooks.callback(after.remove)
            yield

    def alive_bytes(self) -> Counter[str]:
        found: Counter[str] = Counter()
        for reference, size, part in self.seen.values():
            if not reference.expired():
                found[part] += size
        return found
