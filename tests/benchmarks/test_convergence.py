"""The convergence experiment: its plan, and a very small one, trained, stopped, gone on with and recorded for real."""

import gzip
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import replace
from statistics import mean

import pytest
import torch
from PIL import Image

from benchmarks import convergence as experiment
from framework.config import load
from framework.errors import UsageError
from framework.files import alone_in
from framework.models.build import build_detector
from tests.paths import REPOSITORY as ROOT

CPU = experiment.SIZES["cpu"]


@pytest.mark.parametrize("size", experiment.SIZES)
@pytest.mark.parametrize("model", experiment.MODELS)
def test_every_model_can_be_built_and_shares_all_that_is_to_be_compared(size, model):
    path = ROOT / "configs" / f"convergence_{size}.yaml"
    base, config = load(path, []), load(path, [*experiment.MODELS[model].departures, "model.num_classes=6"])
    build_detector(config.model)
    assert (config.data, config.optim, config.eval, config.train) == (base.data, base.optim, base.eval, base.train)
    for key in ("width", "num_queries", "encoder_layers", "decoder_layers", "ffn_width", "dropout", "num_heads"):
        assert getattr(config.model, key) == getattr(base.model, key)
    assert replace(config.model.backbone, dilation=False) == base.model.backbone
    assert replace(config.loss, class_weight=2.0, auxiliary=True) == base.loss
    [last] = [stage for name, stage in build_detector(config.model).backbone.named_children() if name == "layer4"]
    dilated = any(conv.dilation == (2, 2) for conv in last.modules() if isinstance(conv, torch.nn.Conv2d))
    assert dilated == config.model.backbone.dilation


def test_protocol_and_sweep():
    n = CPU.epochs
    runs = experiment.plan("reported", CPU, 3, CPU.chosen)
    of_detr = sorted(run.epochs for run in runs if run.model == "detr-dc5" and run.seed == 1)
    assert of_detr == [n, 2.5 * n, 5 * n, 10 * n]
    assert {run.seed for run in runs} == {1, 2, 3} and len(runs) == 15
    sweep = experiment.plan("sweep", CPU, 3, CPU.chosen)
    tried = {model: [run.lr for run in sweep if run.model == model] for model in ("deformable", "detr-dc5")}
    assert len(set(tried["deformable"])) == len(set(tried["detr-dc5"])) == len(sweep) / 2
    assert not {run.seed for run in sweep} & {run.seed for run in runs}
    assert all(CPU.chosen[run.model] == run.lr for run in runs)
    assert all(CPU.chosen[model] in rates for model, rates in tried.items())


def test_every_run_has_cores_of_its_own(monkeypatch):
    monkeypatch.setattr(experiment.os, "sched_getaffinity", lambda _: {4, 5, 6, 7, 8})
    assert experiment.shares_of_cores(2) == [{4, 6, 8}, {5, 7}]
    assert experiment.shares_of_cores(6)[4:] == [{8}, {4}]


def test_the_sweep_decides(tmp_path, monkeypatch):
    """On the rates once it is complete; the learning rates that stand in SIZES are what the recorded one found."""
    recorded = experiment.Experiment("cpu", record=True)
    if all(map(recorded.folder, recorded.plan("sweep", 1))):
        assert recorded.rates() == CPU.chosen
    monkeypatch.setattr(experiment, "RECORDED", tmp_path)
    one = experiment.Experiment("cpu", record=True)
    runs = one.plan("sweep", 1)
    for i, run in enumerate(runs):
        assert one.rates() == CPU.chosen or i > 2
        one.recorded(run).mkdir(parents=True)
        (one.recorded(run) / "run.json").write_text(json.dumps({"AP": {1e-4: 0.1, 8e-4: 0.3}.get(run.lr, 0.0)}))
    assert one.rates() == {"detr-dc5": 1e-4, "deformable": 8e-4}
    assert {run.lr for run in one.plan("more", 1) if run.model == "two-stage"} == {8e-4}


def test_the_docs_quote_the_recorded_runs():
    recorded, text = ROOT / "docs/results/convergence", " ".join((ROOT / "docs/convergence.md").read_text().split())
    for folder in (path.parent for path in recorded.glob("*/convergence.json")):
        found = json.loads((folder / "convergence.json").read_text())["protocol"]
        longest = found["schedules"][-1]
        assert (f"Deformable DETR ended at AP {100 * found['AP']:.1f} after {found['epochs']:g} epochs, DETR-DC5 at "
                f"{100 * longest['AP']:.1f} after {longest['epochs']:g}") in text  # fmt: skip
        assert found["ratio"] is None or folder.name != "1000-images"
    seen = [json.loads(path.read_text())["AP"]
            for path in sorted((recorded / "1000-images" / "on-training-images").glob("*.json"))]  # fmt: skip
    assert f"DETR-DC5 has AP {100 * seen[1]:.1f}, Deformable DETR {100 * seen[0]:.1f}" in text
    tables = recorded / "cpu" / "tables.json"
    for row in json.loads(tables.read_text())["sweep"]["runs"] if tables.exists() else []:
        assert f"| {row['model']} | {row['epochs']} | {row['learning rate']:g} | {row['AP']} |" in text
    looked = json.loads(tables.read_text())["where they look"]["runs"]
    for title, row in zip(("Deformable DETR has AP ", "DETR-DC5 "), looked, strict=True):
        assert f"{title}{row['AP']}" in text and f"after {row['stopped after']} of {row['epochs']} epochs" in text
    for path in recorded.glob("cpu/*-seed[123]/run.json"):
        run = json.loads(path.read_text())
        title = experiment.MODELS[run["model"]].title
        of = "" if run["data"] == "drawn" else f"| {run['data']} "
        assert f"{of}| {title} | {run['epochs']} | {run['seed']} | {100 * run['AP']:.1f} |" in text
        whole = recorded / "cpu" / f"deformable-4-epochs-lr0.0004-seed{run['seed']}" / "run.json"
        if run["model"] in experiment.WITHOUT:
            lost = f"{100 * (run['AP'] - json.loads(whole.read_text())['AP']):+.1f}"
            assert lost in text[text.index("| taken away or changed |") :].split(f"| {title} | ")[1][:20].split(" |")[0]


def test_docs_and_readme_quote_the_report():
    """Means by size, the protocol's words, epochs to shares of the baseline's best, the set, hours on a GPU."""
    recorded = ROOT / "docs/results/convergence/cpu"
    text = " ".join((ROOT / "docs/convergence.md").read_text().split())
    readme = " ".join((ROOT / "README.md").read_text().split())
    report = json.loads((recorded / "convergence.json").read_text())
    protocol = report["protocol"]
    assert f"**{protocol['in words']}**" in text and protocol["in words"] in readme
    aps = ", ".join(f"{100 * row['AP']:.1f}" for row in protocol["schedules"])
    epochs = ", ".join(f"{row['epochs']:g}" for row in protocol["schedules"])
    for quoted in (text, readme):
        assert f"AP {100 * protocol['AP']:.1f} after {protocol['epochs']:g} epochs" in quoted
        assert f"{aps} after complete schedules of {epochs}" in quoted

    runs: dict[str, list] = {}
    for run in report["runs"]:
        runs.setdefault(run["label"], []).append(run["points"][-1])
    for label, ends in runs.items():
        means = " | ".join(f"{100 * mean(end[key] for end in ends):.1f}" for key in ("AP", "APs", "APm", "APl"))
        assert f"| {label} | {len(ends)} | {means} |" in text

    method, baseline = protocol["method"], protocol["schedules"][-1]["label"]
    rows = {(row["share"], row["label"]): row for row in report["milestones"]}
    for share in (0.5, 0.75, 0.9, 1.0):
        ours, theirs = rows[share, method], rows[share, baseline]
        cells = [shown(ours["epoch"]), shown(theirs["epoch"]), shown(ours["epoch, times sooner"])]
        assert f"| {share:.0%} | {100 * ours['AP']:.1f} | {' | '.join(cells)} |" in text

    equal = json.loads((recorded / "tables.json").read_text())["the same seed twice"]["runs"]
    assert all(row["equal"] for row in equal) and "equal to the last bit" in text
    assert "end at AP {:.1f} and {:.1f}, where".format(*(100 * row["AP"] for row in equal)) in text
    ours, theirs = (mean([row["hours"], row["hours, again"]]) for row in equal)
    assert [row["model"] for row in equal] == ["Deformable DETR", "DETR-DC5"]
    assert f"takes {ours:.3f} hours for its 4 epochs, DETR-DC5 {theirs:.3f}." in text
    assert f"DETR-DC5 are {20 * theirs:.2f} hours, **{20 * theirs / ours:.1f} times**" in text
    assert f"do not suffice, {10 * theirs / ours:.1f} times" in text and f"costs {theirs / ours:.2f} of one" in text
    assert f"the {600 * theirs:.0f} minutes of its longer run" in text

    drawn = json.loads((recorded / "set.json").read_text())["composition"]["train"]
    sizes = ", ".join(f"{100 * drawn[size]:.0f} % {size}" for size in ("small", "medium", "large"))
    assert f"{sizes}; {drawn['objects_per_image']} an image" in text
    assert f"({100 * drawn['covered']:.0f} % are partly covered)" in text

    steps = json.loads((ROOT / "docs/results/gpu-train-step.json").read_text())
    for title, words in (("coco_r50_deformable, 800 x 1066, bf16, batch 2", "base"),
                         ("coco_r50_deformable_two_stage, 800 x 1066, bf16, batch 4", "two-stage")):  # fmt: skip
        rate = steps[title]["images/s"]
        assert f"{words} model, {rate:.1f} images/s" in text
        assert f"{50 * 118_287 / rate / 3600:.0f}" in text[text.index(f"{words} model, {rate:.1f} images/s") :][:90]


def shown(spread: list[float] | None) -> str:
    if spread is None:
        return "not reached"
    low, middle, high = (f"{number:.3g}" for number in spread)
    return middle if low == high else f"{middle} ({low} to {high})"


def test_longer_schedules_count_once_all_seeds_have_theirs(tmp_path, monkeypatch):
    one = experiment.Experiment("cpu", record=True)
    reported, longer = one.plan("reported", 2), one.plan("longer", 2)
    done = {*reported, longer[0]}
    monkeypatch.setattr(one, "folder", lambda run: tmp_path if run in done else None)
    assert [len(runs) for runs in one.whole_seeds()] == [5, 5]
    done.add(longer[1])
    assert [runs[-1] for runs in one.whole_seeds()] == longer
    done.remove(reported[0])  # the rest of its seed is not there
    assert one.whole_seeds() == [[*reported[5:], longer[1]]]


def test_the_set_is_drawn_without_avx512():
    """With it numpy's arctan2 has other last bits, and the set would not be the recorded one."""
    program = "import numpy; print(*numpy.show_config(mode='dicts')['SIMD Extensions'].get('found', []))"
    command = [sys.executable, "-c", program]
    found = [subprocess.run(command, env=os.environ | more, capture_output=True, text=True, check=True)
             for more in ({}, experiment.DRAWN_BY)]  # fmt: skip
    before, after = ([name for name in one.stdout.split() if "512" in name or name == "X86_V4"] for one in found)
    if not before:
        pytest.skip("this CPU or this numpy has no AVX-512")
    assert not after


def test_names_are_unique():
    runs = {run for part in experiment.PARTS for run in experiment.plan(part, CPU, 3, CPU.chosen)}
    assert len({run.name for run in runs}) == len(runs)


@pytest.fixture
def small(tmp_path, monkeypatch):
    """The experiment in an empty folder, with 8 images and schedules of 3 and 6 epochs of one step."""
    drawn = ("--images", "8", "--val", "4", "--size", "64", "--zoom", "2")
    monkeypatch.setitem(experiment.SIZES, "cpu", replace(CPU, drawn=drawn, epochs=3, times=(2, 1), jobs=2))
    for name in ("configs", "framework", "ops", "data_tools"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.setattr(experiment, "LOOKED_AT", (1,))
    monkeypatch.setattr(experiment, "ROOT", tmp_path)
    monkeypatch.setattr(experiment, "RECORDED", tmp_path / "recorded")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_stopped_gone_on_with_recorded_and_not_trained_again(small, capfd):
    plain = ("--parts", "again", "reported", "attention", "--seeds", "1", "--record")
    # One that was to begin by itself, and was stopped before it did, is in no other's way.
    (small / "runs/convergence-cpu/detr-dc5-6-epochs-lr0.0002-seed1").mkdir(parents=True)
    assert experiment.main([*plain, "--minutes", "0"]) == 0
    assert "not done" in capfd.readouterr().out and not list((small / "recorded").rglob("run.json"))

    one = experiment.Experiment("cpu", record=True)
    again = one.plan("again", 1)[0]
    working = one.start(again, one.settings(again), experiment.shares_of_cores(2)[0])
    while not list((one.work / again.name).glob("checkpoints/step-*[0-9]/MANIFEST.json")):
        assert working.poll() is None, (one.work / again.name / "output.txt").read_text()
        time.sleep(0.01)
    working.kill()
    working.wait()

    assert experiment.main(list(plain)) == 0
    said = capfd.readouterr().out
    assert "resuming from" in (one.work / again.name / "output.txt").read_text()
    assert len(list((small / "recorded" / "cpu").glob("*/run.json"))) == 7 and f"{again.name}: AP" in said
    facts = json.loads((small / "recorded/cpu" / again.name / "run.json").read_text())
    assert [point["epoch"] for point in facts["points"]] == [1, 2, 3]
    for path in (path for path in (small / "recorded").rglob("*") if path.is_file()):
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        assert str(small).encode() not in content and socket.gethostname() not in path.name
    # Six epochs began as three, and have the same weights as if they had been trained for themselves.
    [six] = [run for run in one.plan("reported", 1) if run.epochs == 6]
    assert "resuming from" in (one.work / six.name / "output.txt").read_text()
    alone = replace(six, again=3)
    one.train([alone], 2, time.monotonic() + 60)  # with as many cores, or its last bits are others
    assert one.facts(alone)["weights_sha256"] == one.facts(six)["weights_sha256"]
    shutil.rmtree(one.recorded(alone))
    capfd.readouterr()
    tables = json.loads((small / "recorded/cpu/tables.json").read_text())
    assert all(row["equal"] for row in tables["the same seed twice"]["runs"])
    assert len(json.loads((small / "recorded/cpu/convergence.json").read_text())["protocol"]["schedules"]) == 2
    assert Image.open(small / "recorded/cpu/attention.png").width > 500

    two = one.plan("reported", 2)[-1]  # of a second seed, of which the rest is missing
    shutil.copytree(one.recorded(replace(two, seed=1)), one.recorded(two))
    assert experiment.main(list(plain)) == 0
    assert "starts" not in capfd.readouterr().out
    protocol = json.loads((small / "recorded/cpu/convergence.json").read_text())["protocol"]
    assert {row["seeds"] for row in protocol["schedules"]} == {protocol["seeds"]} == {1}

    with alone_in(one.work, ""), pytest.raises(UsageError, match="another process is writing it"):
        experiment.main(list(plain))
    run = small / "recorded/cpu" / again.name / "run.json"
    facts = run.read_text()
    run.write_text(facts.replace(json.loads(facts)["data_fingerprint"], "another"))
    with pytest.raises(UsageError, match="fingerprint another, and .*drawn-shards has .*: they cannot be compared"):
        experiment.main(list(plain))
    run.write_text(facts)
    config = small / "recorded/cpu" / again.name / "config.yaml"
    config.write_text(config.read_text().replace("num_queries: 40", "num_queries: 41"))
    with pytest.raises(UsageError, match="another configuration: model.num_queries: 41 -> 40"):
        experiment.main(list(plain))


def test_a_run_that_fails_is_told_and_the_others_go_on(small, monkeypatch, capfd):
    broken = experiment.Model("broken", ("model.width=33",))
    monkeypatch.setitem(experiment.MODELS, "one-level", broken)
    monkeypatch.setattr(experiment, "WITHOUT", ("one-level", "one-point"))
    assert experiment.main(["--parts", "without"]) == 1
    said = capfd.readouterr().out
    assert "model.width" in said and re.search("one-point-3-epochs-.*: AP", said)


def test_bad_arguments(small, monkeypatch):
    monkeypatch.setattr(experiment, "DATA", small)
    with pytest.raises(UsageError, match="TENFOLD_DATA"):
        experiment.main(["--parts", "aquarium"])
    with pytest.raises(UsageError, match="--jobs 0"):
        experiment.main(["--jobs", "0"])
