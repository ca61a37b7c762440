"""Steps that are not taken, on two real ranks with the real engine."""

import logging
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from framework.engine import checkpoint
from framework.engine.checkpoint import Checkpoints
from framework.engine.ds_config import EngineConfig, deepspeed_config, start_engine
from framework.engine.guard import REMEMBERED, Guard, GuardConfig
from framework.engine.optimizer import OptimConfig, build_optimizer
from framework.engine.ranks import Ranks
from framework.engine.rehearsal import rehearse
from framework.engine.shares import gather, shares_of
from framework.engine.step import train_step
from framework.errors import InputError, UsageError
from framework.losses.criterion import Criterion
from framework.losses.matcher import LossConfig
from tests.distributed import run_ranks
from tests.engine.tiny import batch_of, tiny_detector

STAGES = (0, 1, 2, 3)


class Run:
    """Two micro-batches a rank and step."""

    def __init__(self, ranks: Ranks, stage: int, guard: GuardConfig | None = None):
        self.ranks, self.step, self.guard = ranks, 0, Guard(guard or GuardConfig(), ranks)
        self.model = tiny_detector()
        ds_config = deepspeed_config(
            EngineConfig(zero_stage=stage, precision="fp32"), device=ranks.device, global_batch=4 * ranks.world,
            micro_batch=2, accumulation=2, clip_norm=0.1,
        )  # fmt: skip
        self.engine = start_engine(self.model, build_optimizer(self.model, OptimConfig(), ranks.device), ds_config)
        self.criterion = Criterion(LossConfig(), "focal")

    def take(self, spoil=None) -> dict[str, float]:
        """One step, of which `spoil` changes this rank's second micro-batch."""
        first = 2 * (2 * self.step + self.ranks.rank)
        batches = [batch_of(first), batch_of(first + 1)]
        if spoil is not None:
            spoil(batches[1])
        metrics = train_step(self.engine, self.criterion, batches, ranks=self.ranks, seed=0, step=self.step,
                             guard=self.guard)  # fmt: skip
        self.step += 1
        return {name: self.ranks.sum(value.clone()).item() / self.ranks.world for name, value in metrics.items()}

    def weights(self) -> dict[str, torch.Tensor]:
        shares = shares_of(self.engine)
        return gather(self.engine, shares, {"": [s.weight for s in shares]}, self.ranks, everywhere=True)


def norms(ranks: Ranks) -> list[float]:
    return [Run(ranks, stage).take()["grad_norm"] for stage in STAGES]


def test_the_norm_of_gradients_is_the_same_at_every_stage():
    """At stage 0 it is torch's own; at 1 and 2 `spare_the_processor`'s, from what each rank holds."""
    for found in run_ranks(2, norms):
        assert found == pytest.approx([found[0]] * len(STAGES), rel=1e-5) and found[0] > 0.1


def with_nan(batch) -> None:
    batch.targets.boxes_cxcywh_N4[0] = math.nan


def one_bad_step(ranks: Ranks) -> list[tuple[bool, bool, list[str], float]]:
    found = []
    for stage in STAGES:
        lines: list[str] = []
        handler = logging.Handler()
        handler.emit = lambda record, to=lines: to.append(record.getMessage())
        logging.getLogger("tenfold").addHandler(handler)
        run, plain = Run(ranks, stage), Run(ranks, stage)
        run.take(), plain.take()
        before = run.weights()
        skipped = run.take(with_nan if ranks.rank == 1 else None) == {}
        unchanged = all(torch.equal(tensor, before[name]) for name, tensor in run.weights().items())
        plain.step += 1
        found.append((skipped, unchanged, lines, run.take()["loss/total"] - plain.take()["loss/total"]))
        logging.getLogger("tenfold").removeHandler(handler)
    return found


def test_a_loss_that_is_no_number_on_one_rank_is_skipped_on_all(caplog):
    first, second = run_ranks(2, one_bad_step)
    for stages in (first, second):
        for skipped, unchanged, _, difference in stages:
            assert skipped and unchanged and difference == 0.0
    for _, _, lines, _ in first:
        assert lines == ["step 2 is skipped: the loss is not finite; image ids: 14, 15"]
    assert all(lines == [] for _, _, lines, _ in second)


def too_many(ranks: Ranks) -> str:
    run = Run(ranks, 1, GuardConfig(max_skipped=1))
    run.take(with_nan), run.take(), run.take(with_nan)
    with pytest.raises(InputError) as error:
        run.take(with_nan)
    return str(error.value)


def test_one_too_many_in_a_row_ends_the_run():
    (message,) = run_ranks(1, too_many)
    assert "step 4: the loss is not finite, and so in 2 steps in a row" in message
    assert "guard.max_skipped is 1" in message and "image ids: 26, 27; lower optim.lr" in message


def spoil_gradient(module, inputs, output) -> None:
    output.register_hook(lambda gradient: gradient * math.nan)


def broken_gradient(ranks: Ranks) -> list[bool]:
    found = []
    for stage in STAGES:
        run = Run(ranks, stage)
        if ranks.rank == 1:  # the loss stays what it is
            run.engine.module.queries.embedding.register_forward_hook(spoil_gradient)
        before = run.weights()
        found.append(run.take() == {} and all(torch.equal(tensor, before[n]) for n, tensor in run.weights().items()))
    return found


def test_a_gradient_that_is_no_number_is_skipped():
    assert run_ranks(2, broken_gradient) == [[True] * 4] * 2


def jumping(ranks: Ranks) -> tuple[float, float, bool]:
    """A loss a hundred times as high: taken while there is nothing to compare it with, and later not."""
    run = Run(ranks, 1, GuardConfig(skip_jumps=3.0, max_skipped=0))
    plain, high = run.criterion, Criterion(LossConfig(class_weight=200, box_weight=500, giou_weight=200), "focal")
    run.criterion = high
    early = run.take()["loss/total"]
    run.criterion = plain
    ordinary = run.take()["loss/total"]
    run.guard.losses.extend([ordinary] * REMEMBERED)
    run.criterion = high
    with pytest.raises(InputError, match=r"a loss of .* is over .*guard.skip_jumps.*image ids: 16, 17, 18, 19"):
        run.take()
    resumed = Guard(run.guard.config, ranks, run.guard.state())
    return early, ordinary, list(run.guard.losses) == list(resumed.losses)


def test_a_jump_in_fp16_is_no_overflow():
    scaler = SimpleNamespace(dynamic=True, cur_scale=4.0, min_scale=1.0)
    engine = SimpleNamespace(optimizer=SimpleNamespace(loss_scaler=scaler))
    alone = Ranks(0, 1, 0, torch.device("cpu"))
    guard = Guard(GuardConfig(skip_jumps=3.0, max_skipped=0), alone)
    guard.losses.extend([1.0] * REMEMBERED)
    guard.skipped(1, [torch.tensor(2.0)], [[5]], engine)  # an overflow
    with pytest.raises(InputError, match=r"a loss of 4 is over 3 .*image ids: 7;"):
        guard.skipped(2, [torch.tensor(2.0), torch.tensor(4.0)], [[5], [7]], engine)


def test_a_loss_that_jumps_is_skipped_if_so_wanted():
    ((early, ordinary, kept),) = run_ranks(1, jumping)
    assert early > 50 * ordinary and kept


def half_precision(ranks: Ranks, run_dir: Path) -> list[tuple[float, bool, float]]:
    """On the CPU, where only its linear layers can: loss scale, whether the step was taken, the scale then; of a run in
    fp16, the fourth step by one that went on from its checkpoint."""

    def engine_of(dtype: str):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(7, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3))
        ds_config = deepspeed_config(EngineConfig(precision="fp32"), device=ranks.device, global_batch=2, micro_batch=2,
                                     accumulation=1, clip_norm=0.1)  # fmt: skip
        ds_config["torch_autocast"] = {"enabled": dtype != "float32", "dtype": dtype}  # fp16 is refused without a GPU
        return start_engine(model, build_optimizer(model, OptimConfig(lr=1e-2), ranks.device), ds_config)

    def take(engine) -> tuple[bool, float]:
        loss = engine(torch.linspace(-3, 3, 14).view(2, 7)).float().square().mean()
        engine.backward(loss)
        engine.step()
        if not engine.was_step_applied():
            guard.skipped(1, [loss.detach()], [[1, 2]], engine)
        return engine.was_step_applied(), float(engine.get_global_grad_norm())

    guard = Guard(GuardConfig(max_skipped=0), ranks)
    single, half, found = engine_of("float32"), engine_of("float16"), []  # of fp16 DeepSpeed makes a global
    for scale in (2.0**16, 2.0**24, 2.0**10):
        half.optimizer.loss_scaler.cur_scale = scale
        taken, norm = take(half)
        found.append((scale, taken, half.optimizer.loss_scale))
        if taken:
            assert norm == pytest.approx(take(single)[1], rel=2e-2)
    halved, exact = (torch.cat([p.flatten() for p in engine.module.parameters()]) for engine in (half, single))
    assert torch.allclose(halved, exact, atol=2e-3) and not torch.equal(halved, exact)
    with Checkpoints(run_dir, ranks, set) as checkpoints:
        checkpoints.save(half, {"step": 3})
    again = engine_of("float16")
    checkpoint.load_optimizer(checkpoint.newest(run_dir), again)
    found.append((again.optimizer.loss_scale, *take(again)[:1], again.optimizer.loss_scale))
    return found


def test_an_overflow_of_fp16_lowers_the_scale_and_is_no_fault(tmp_path):
    ((first, overflowing, third, resumed),) = run_ranks(1, half_precision, tmp_path)
    assert first == (2.0**16, True, 2.0**16) and overflowing == (2.0**24, False, 2.0**23)
    assert third == (2.0**10, True, 2.0**10) and resumed == third


def rehearsed(ranks: Ranks, broken_at: int | None) -> list[str]:
    told = []
    for stage in STAGES:
        run, plain = Run(ranks, stage), Run(ranks, stage)
        if broken_at is not None:

            def full(module, inputs):
                if len(inputs[0]) >= broken_at:
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")

            run.engine.module.backbone.register_forward_pre_hook(full)
        try:
            rehearse(run.engine, run.criterion, [(80, 96), (96, 72)], 5, ranks=ranks, config=EngineConfig(stage))
        except UsageError as error:
            told.append(str(error))
            continue
        assert run.engine.skipped_steps == 1
        before, after = plain.take(), run.take()
        assert before == after, stage
        told.append("fits")
    return told


def test_the_largest_batch_first_changes_nothing_and_says_what_fits():
    assert run_ranks(2, rehearsed, None) == [["fits"] * 4] * 2
    for messages in run_ranks(2, rehearsed, 2):
        for stage, message in enumerate(messages):
            assert message.startswith("train.micro_batch: a step on 2 images of 96 x 96 px") and "\n" not in message
            then = "1 of them fit" if stage < 3 else "set a smaller"  # where that needs the others, too
            assert ("engine.zero_stage=1" in message) == (stage == 0)
            assert f"CUDA out of memory. Tried to allocate 2.00 GiB.); {then}" in message
