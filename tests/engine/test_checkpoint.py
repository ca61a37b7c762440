"""Save, break, load: real DeepSpeed engines in real processes."""

import json
import logging
import subprocess
from pathlib import Path

import pytest
import torch
from torch import nn

from data_tools.sample import read_manifest
from framework.data.loader import DataConfig, TrainLoader
from framework.engine import checkpoint, ds_config
from framework.engine.checkpoint import Checkpoints
from framework.engine.ds_config import EngineConfig, deepspeed_config, start_engine
from framework.engine.ema import Ema
from framework.engine.optimizer import OptimConfig, build_optimizer, learning_rates, set_learning_rates
from framework.engine.ranks import Ranks, init_ranks
from framework.engine.shares import gather, shares_of
from framework.errors import InputError, UsageError
from tests.data.shards import make_sample, write_shards
from tests.disk import fill, small_disk
from tests.distributed import run_ranks

GLOBAL_BATCH = 8


class Model(nn.Module):
    """All three parameter groups, a tied layer, one that is not trained, a buffer; sizes that no world divides."""

    def __init__(self, width: int = 13):
        super().__init__()
        self.backbone = nn.Linear(7, width)
        self.reference_points = nn.Linear(width, 5)
        self.heads = nn.ModuleList([nn.Linear(5, 3)] * 2)
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        self.register_buffer("scale", torch.full((3,), 1.5))

    def forward(self, x):
        hidden = self.reference_points(self.backbone(x).relu())
        return self.frozen(sum(head(hidden) for head in self.heads)) * self.scale


def engine_of(ranks: Ranks, stage: int, folder: Path | None = None, **changes):
    """Of weights that the seed, or a checkpoint, gives."""
    torch.manual_seed(0 if folder is None else 1)
    model, optim = Model(), OptimConfig(lr=1e-2)
    if folder is not None:
        checkpoint.load_weights(folder, model)
    micro, config = 2, EngineConfig(zero_stage=stage, precision="fp32", **changes)
    return start_engine(model, build_optimizer(model, optim, ranks.device), deepspeed_config(
        config, device=ranks.device, global_batch=GLOBAL_BATCH, micro_batch=micro,
        accumulation=GLOBAL_BATCH // micro // ranks.world, clip_norm=0.1,
    ))  # fmt: skip


def save(engine, run_dir: Path, step: int, ranks: Ranks, ema: Ema | None = None, keep: int = 2) -> None:
    with Checkpoints(run_dir, ranks, lambda steps: set(steps[:keep])) as checkpoints:
        checkpoints.save(engine, {"step": step}, ema)
        checkpoints.finish()


def train(engine, ranks: Ranks, steps: range) -> list[float]:
    """The mean loss of the global batch at each step; who computes which micro-batch is as in training."""
    losses = []
    for step in steps:
        rates = learning_rates(OptimConfig(lr=1e-2), step, global_batch=32, steps_per_epoch=2, drop_epochs=[2])
        set_learning_rates(engine.optimizer, rates)
        mine = GLOBAL_BATCH // 2 // ranks.world
        total = torch.zeros(())
        for micro in range(ranks.rank * mine, (ranks.rank + 1) * mine):
            x = torch.randn(2, 7, generator=torch.Generator().manual_seed(100 * step + micro))
            loss = (engine(x) - x[:, :3]).square().mean()
            engine.backward(loss)
            engine.step()
            total += loss.detach() / (GLOBAL_BATCH // 2)
        losses.append(ranks.sum(total).item())
    return losses


def first_half(ranks: Ranks, stage: int, run_dir: Path, **changes) -> list[float]:
    engine = engine_of(ranks, stage, **changes)
    losses = train(engine, ranks, range(3))
    save(engine, run_dir, 3, ranks)
    return losses + train(engine, ranks, range(3, 6))


def second_half(ranks: Ranks, stage: int, run_dir: Path, **changes) -> list[float]:
    folder = checkpoint.newest_on_all(run_dir, ranks)
    assert folder is not None
    engine = engine_of(ranks, stage, folder, **changes)
    assert checkpoint.load_optimizer(folder, engine)["step"] == 3
    return train(engine, ranks, range(3, 6))


STAGES = (0, 1, 2, 3)


def save_and_resume(ranks: Ranks, run_dir: Path) -> dict[int, tuple[list[float], list[float]]]:
    return {
        stage: (
            first_half(ranks, stage, run_dir / f"{stage}"),
            second_half(ranks, stage, run_dir / f"{stage}"),
        )
        for stage in STAGES
    }


def sent_early(ranks: Ranks, run_dir: Path) -> list[list[float]]:
    """By stage and by whether gradients are sent while backward goes on, in buckets of a few weights."""
    ds_config.BUCKET, usual = 40, ds_config.BUCKET
    found = [train(engine_of(ranks, stage, overlap_comm=early), ranks, range(4))
             for stage in (1, 2) for early in (False, True)]  # fmt: skip
    ds_config.BUCKET = usual
    return found


def resume_at_other_stages(ranks: Ranks, run_dir: Path) -> dict[int, list[float]]:
    return {stage: second_half(ranks, STAGES[stage - 1], run_dir / f"{stage}") for stage in STAGES}


@pytest.mark.parametrize("world", [1, 2])
def test_resume_is_exact_in_the_same_world_and_close_in_another(world, tmp_path):
    for per_stage in run_ranks(world, save_and_resume, tmp_path):
        for whole, resumed in per_stage.values():
            assert whole[3:] == resumed
        for stage in STAGES:
            assert per_stage[stage][0] == pytest.approx(per_stage[0][0], rel=1e-6)
    # What two ranks wrote one reads, and the other way round, at another stage.
    for others in run_ranks(3 - world, resume_at_other_stages, tmp_path):
        for stage, losses in others.items():
            assert losses == pytest.approx(per_stage[stage][1], rel=1e-5)


def test_sending_gradients_early_changes_no_step(tmp_path):
    for after, early, after_2, early_2 in run_ranks(2, sent_early, tmp_path):
        assert early == pytest.approx(after, rel=1e-6)
        assert early_2 == pytest.approx(after_2, rel=1e-6)


def with_other_keys(ranks: Ranks, run_dir: Path) -> list[list[float]]:
    plain = first_half(ranks, 1, run_dir)
    return [plain[3:], second_half(ranks, 3, run_dir, secondary_partition=2), plain,
            *(first_half(ranks, stage, run_dir / f"{stage}", offload_optimizer=True) for stage in (1, 3)),
            *(second_half(ranks, stage, run_dir / f"{stage}", offload_optimizer=True) for stage in (3, 1))]  # fmt: skip


def test_a_secondary_partition_and_an_optimizer_in_host_memory_change_nothing(tmp_path):
    """On the CPU host memory is what everything is in: the code runs, and what it is for does not come about."""
    for losses, secondary, whole, *offloaded in run_ranks(2, with_other_keys, tmp_path):
        assert secondary == pytest.approx(losses, rel=1e-6)
        for others in offloaded:
            assert others == pytest.approx(whole[-len(others) :], rel=1e-6)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run folder with two checkpoints, made by one process."""
    run_dir = tmp_path_factory.mktemp("run")
    run_ranks(1, save_two, run_dir)
    return run_dir


def save_two(ranks: Ranks, run_dir: Path) -> None:
    engine = engine_of(ranks, 1)
    for step in (1, 2, 3):
        train(engine, ranks, range(step - 1, step))
        save(engine, run_dir, step, ranks)


@pytest.fixture
def run_dir(saved, tmp_path):
    import shutil

    return Path(shutil.copytree(saved, tmp_path / "run"))


def test_only_the_newest_are_kept(saved):
    assert sorted(p.name for p in (saved / "checkpoints").iterdir()) == ["step-00000002", "step-00000003"]


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("file", ["weights.safetensors", "optimizer.safetensors", "state.json", "MANIFEST.json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_a_damaged_checkpoint_is_passed_over(run_dir, file, damage, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("tenfold"), "propagate", True)
    path = run_dir / "checkpoints/step-00000003" / file
    if damage == "flip":
        if file == "MANIFEST.json":
            path.write_text(path.read_text().replace("bytes", "bytez"))
        else:
            flip_a_byte(path)
    elif damage == "truncate":
        path.write_bytes(path.read_bytes()[:-7])
    else:
        path.unlink()
    assert checkpoint.newest(run_dir).name == "step-00000002"
    assert "step-00000003 is not used" in caplog.text


def test_an_unfinished_checkpoint_is_not_taken(run_dir):
    (run_dir / "checkpoints/step-00000003").rename(run_dir / "checkpoints/step-00000009.tmp")
    assert checkpoint.newest(run_dir).name == "step-00000002"


def test_no_checkpoint_at_all(tmp_path):
    assert checkpoint.newest(tmp_path) is None


def test_another_model_is_refused_by_name(saved):
    model = Model(width=11)
    before = model.backbone.weight.clone()
    with pytest.raises(InputError) as error:
        checkpoint.load_weights(checkpoint.newest(saved), model)
    assert torch.equal(before, model.backbone.weight)
    assert "a checkpoint of another model" in str(error.value)
    assert "backbone.weight: found [13, 7], expected [11, 7]" in str(error.value)


def test_files_hold_names_and_no_pickle(saved):
    folder = checkpoint.newest(saved)
    weights = checkpoint.read_weights(folder)
    assert set(weights) == {f"{layer}.{kind}" for layer in ("backbone", "reference_points", "heads.0")
                            for kind in ("weight", "bias")} | {"scale", "frozen.weight", "frozen.bias"}  # fmt: skip
    assert json.loads((folder / "state.json").read_text())["adam_step"] == 3
    assert {p.suffix for p in folder.iterdir()} == {".safetensors", ".json"}


def test_one_that_may_not_write_any_more_leaves_no_checkpoint(tmp_path):
    ranks, allowed = init_ranks(), [True, True, False]  # asked again before older ones are dropped

    def refuse() -> None:
        if not allowed.pop(0):
            raise InputError("another has taken over")

    engine = engine_of(ranks, 1)
    train(engine, ranks, range(1))
    with Checkpoints(tmp_path, ranks, set, refuse) as checkpoints:
        checkpoints.save(engine, {"step": 1})
        checkpoints.save(engine, {"step": 2})
        with pytest.raises(InputError, match="another has taken over"):
            checkpoints.finish()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]


def write_into_a_file(ranks: Ranks, run_dir: Path) -> tuple[str, bool]:
    engine = engine_of(ranks, 1)
    with Checkpoints(run_dir, ranks, set) as checkpoints:
        checkpoints.save(engine, {"step": 1})
        train(engine, ranks, range(1))
        with pytest.raises(InputError) as error:
            checkpoints.save(engine, {"step": 2})
    return str(error.value), checkpoints.failure is not None


def test_a_failed_write_is_an_error_on_every_rank_at_the_next_save(tmp_path):
    (tmp_path / "checkpoints").write_text("in the way of a folder")
    told = run_ranks(2, write_into_a_file, tmp_path)
    assert all("step-00000001 could not be written: NotADirectoryError" in message for message, _ in told)
    assert [failed for _, failed in told] == [True, False]  # so the main one can tell the others before


def save_on_bad_disks(ranks: Ranks, disk: Path) -> list[str]:
    """A full one and a read-only one, after one save that was possible; what went on from it."""
    engine, run_dir, told = engine_of(ranks, 1), disk / "run", []
    train(engine, ranks, range(1))
    save(engine, run_dir, 1, ranks)
    fill(disk, left=4096)
    for step in (2, 3):
        with pytest.raises(InputError) as error:
            save(engine, run_dir, step, ranks)
        told.append(str(error.value))
        assert [path.name for path in (run_dir / "checkpoints").iterdir()] == ["step-00000001"]
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    again = engine_of(ranks, 1, checkpoint.newest(run_dir))
    return [*told, f"goes on from {checkpoint.load_optimizer(checkpoint.newest(run_dir), again)['step']}"]


def test_a_full_and_a_read_only_disk_are_told_and_lose_nothing(tmp_path):
    with small_disk(tmp_path / "disk") as disk:
        ((full, read_only, after),) = run_ranks(1, save_on_bad_disks, disk)
    assert "step-00000002 could not be written: " in full and "No space left on device" in full
    assert "step-00000003 could not be written: OSError: " in read_only and "Read-only file system" in read_only
    assert after == "goes on from 1" and "\n" not in full + read_only


def save_step_four(ranks: Ranks, run_dir: Path) -> None:
    save(engine_of(ranks, 1), run_dir, 4, ranks, keep=1)


def test_what_was_just_saved_is_kept_beside_a_broken_newer_one(run_dir):
    (run_dir / "checkpoints/step-00000009").mkdir()
    run_ranks(1, save_step_four, run_dir)
    assert [p.name for p in (run_dir / "checkpoints").iterdir()] == ["step-00000004"]


def test_what_a_killed_attempt_had_begun_to_write_goes(run_dir):
    (run_dir / "checkpoints/step-00000003").rename(run_dir / "checkpoints/step-00000005.tmp")
    run_ranks(1, save_step_four, run_dir)
    assert [p.name for p in (run_dir / "checkpoints").iterdir()] == ["step-00000004"]


def averages(ranks: Ranks, stage: int, run_dir: Path) -> list[dict[str, torch.Tensor]]:
    """After four steps: what the EMA should be, what it is, and what it is in a run that went on after the second;
    after the second: what it should be, and the weights that were saved."""

    def whole(engine, pieces):
        return gather(engine, shares_of(engine), {"": pieces}, ranks, everywhere=True)

    def go_on(engine, ema, steps):
        for step in steps:
            train(engine, ranks, range(step, step + 1))
            ema.update()
            yield whole(engine, [share.weight for share in ema.shares])

    engine = engine_of(ranks, stage)
    ema, history = Ema(engine, 0.25), []
    expected = whole(engine, ema.pieces)
    for number, weights in enumerate(go_on(engine, ema, range(4)), start=1):
        decay = min(0.25, (1 + number) / (10 + number))
        expected = {name: decay * old + (1 - decay) * weights[name] for name, old in expected.items()}
        history.append(expected)
        if number == 2:
            save(engine, run_dir, 2, ranks, ema)
    folder = checkpoint.newest(run_dir)
    other = engine_of(ranks, STAGES[stage - 1], folder)
    again = Ema(other, 0.25)
    checkpoint.load_optimizer(folder, other, again)
    list(go_on(other, again, range(2, 4)))
    saved = {f"/{name}": tensor for name, tensor in checkpoint.read_weights(folder).items()}
    return [history[3], whole(engine, ema.pieces), whole(other, again.pieces), history[1], saved]


def averages_of_stages(ranks: Ranks, run_dir: Path) -> list[list[dict[str, torch.Tensor]]]:
    return [averages(ranks, stage, run_dir / f"{stage}") for stage in STAGES]


def test_the_average_is_what_it_says_and_goes_on_in_another_stage(tmp_path):
    for per_stage in run_ranks(2, averages_of_stages, tmp_path):
        for expected, there, resumed, expected_then, saved in per_stage:
            for name, tensor in expected.items():
                assert torch.allclose(there[name], tensor, atol=1e-6) and torch.allclose(
                    resumed[name], tensor, atol=1e-6
                )
                assert torch.allclose(saved[name], expected_then[name], atol=1e-6)


def seen_by_different_ranks(ranks: Ranks, run_dir: Path, empty: Path, sets: list[Path]) -> tuple[str, str]:
    with pytest.raises(UsageError) as of_run:
        checkpoint.newest_on_all(run_dir if ranks.is_main else empty, ranks)
    config = DataConfig(train=str(sets[ranks.rank]), workers=0)
    train_set = TrainLoader(config, seed=0, global_batch=2, micro_batch=1, rank=ranks.rank, world=2)
    ranks.refuse_different({"data.val": "the same", "data.train": None})
    with pytest.raises(UsageError) as of_data:
        ranks.refuse_different({"data.val": "the same", "data.train": train_set.manifest.fingerprint})
    return str(of_run.value), str(of_data.value)


def test_ranks_that_see_different_folders_or_data_are_refused(saved, tmp_path):
    sets = [write_shards(tmp_path / f"set{n}", [make_sample(n), make_sample(9)]) for n in range(2)]
    for of_run, of_data in run_ranks(2, seen_by_different_ranks, saved, tmp_path, sets):
        assert "does not hold the same checkpoints" in of_run and "step-00000003, None" in of_run
        assert "data.train: not the same set on all ranks" in of_data
        assert all(read_manifest(folder).fingerprint in of_data for folder in sets)
