"""The tables of framework.plan: each part of the plan, a dictionary of numbers, as lines of text."""

from typing import Any

from framework.config import Config
from framework.engine.ds_config import memory_savers
from framework.engine.optimizer import GROUPS, other_batch, unreached_drops

GIB, MIB = 2**30, 2**20
WORTH = 0.1  # a share of stage 0's memory below which sharding is not worth a collective
SHOWN_PARTS = 4  # of the detector, those that keep most


def batch_text(batch: dict[str, int], epochs: dict[str, int] | None, config: Config) -> str:
    lines = ["Batch", "  {global_batch} images a step = {world} ranks x {micro_batch} x {accumulation} "
             "accumulated".format(**batch)]  # fmt: skip
    if epochs is None:
        lines.append(f"  no steps, schedule and assignment: there are no shards at data.train={config.data.train}; "
                     "--images N plans for N")  # fmt: skip
        return "\n".join(lines)
    lines.append("  {images:,} images: {steps_per_epoch:,} steps an epoch, {steps:,} in all".format(**epochs))
    tail = epochs["tail"]
    if tail > 0:
        lines.append(f"  the last {tail} images of each epoch's order are dropped (data.tail=drop)")
    elif tail < 0:
        lines.append(f"  the last step of each epoch is filled up with {-tail} masked slots (data.tail=mask)")
    else:
        lines.append("  nothing is left over at the end of an epoch")
    return "\n".join(lines)


def schedule_text(schedule: list[dict[str, Any]] | None, config: Config) -> str:
    lines = []
    if schedule:
        head = ["from step", "", *GROUPS]
        lines += columns([head, *([f"{row['step']:,}", row["what"], *(f"{row[g]:.3g}" for g in GROUPS)]
                                  for row in schedule)])  # fmt: skip
    drops = unreached_drops(config.train.lr_drop_epochs, config.train.epochs)
    lines += [f"  {said}" for said in (other_batch(config.optim, config.train.global_batch), drops) if said]
    return "\n".join(["Learning rate", *lines]) if lines else ""


def memory_text(stages: dict[str, Any], config: Config) -> str:
    height, width = stages["size_hw"]
    graphs = ["graphs"] * config.engine.cuda_graphs
    names = ["weights", "gradients", "buckets", "optimizer", "activations", *graphs, "total"]
    rows = [["ZeRO", "", *names, ""]]
    for row in stages["stages"]:
        figures = [f"{row['memory'][name] / GIB:.2f}" for name in names]
        rows.append([str(row["stage"]), row["dtype"], *figures, "<- configured" * row["configured"]])
    lines = [f"Memory of a GPU, GiB, with {config.train.micro_batch} x {height} x {width} px, "
             f"{stages['parameters'] / 1e6:.1f}M parameters, {stages['trainable'] / 1e6:.1f}M of them trainable",
             *columns(rows)]  # fmt: skip
    alive = ", ".join(f"{name} {size / GIB:.2f}" for name, size in stages["activations"].items())
    lines.append(f"  activations: {alive} (engine.activation_checkpointing recomputes)")
    sizes = [f"{part} {size / GIB:.2f}" for part, size in stages["activations_by_part"].items()]
    lines.append(f"  of it as configured: {', '.join(sizes[:SHOWN_PARTS])}")
    largest = ", ".join(f"{gb} GB {images}" for gb, images in stages["largest_micro_batch"].items())
    lines.append(f"  images that fit as configured: {largest}")
    bucket = stages["reduce_bucket_size"]
    if bucket > 2 * stages["trainable"] and any(r["configured"] and r["memory"]["buckets"] for r in stages["stages"]):
        lines.append(f"  buckets hold {bucket:,} elements (DeepSpeed's reduce_bucket_size), whatever the model's size")
    if stages["backbone_added"]:
        lines.append(f"  activations are those of {config.model.backbone.name}; a larger backbone keeps more")
    host = max(row["memory"]["host"] for row in stages["stages"])
    if host:
        lines.append(f"  engine.offload_optimizer: up to {host / GIB:.2f} GiB a GPU lie in the host's memory")
    return "\n".join(lines)


def traffic_text(stages: dict[str, Any]) -> str:
    rows = [["ZeRO", "MiB", "of which, times x MiB"]]
    for row in stages["stages"]:
        before, calls = "", []
        for one in row["traffic"]:
            name = f"{one['name']} " * (one["name"] != before)
            calls.append(f"{name}{one['times']} x {one['bytes'] / MIB:.1f} {one['of']}")
            before = one["name"]
        sent = sum(one["sent"] for one in row["traffic"]) / MIB
        rows.append([str(row["stage"]), f"{sent:.1f}", ", ".join(calls)])
    return "\n".join(["Sent by each GPU in a step, by rings", *columns(rows)])


def pays_text(stages: dict[str, Any], pays: dict[str, Any], gpu_gib: float | None, config: Config) -> str:
    lines = [
        "Which stage pays",
        f"  at stage 0 the optimizer is {pays['optimizer_share']:.0%} of the memory, activations "
        f"{pays['activations_share']:.0%}",
    ]
    saved = f"{pays['saved_bytes'] / GIB:.2f} GiB, {pays['saved_share']:.0%} of stage 0's memory"
    if pays["least_state"] == 0:
        lines.append("  no stage takes less than stage 0: ZeRO does not pay here")
    elif pays["saved_share"] < WORTH:
        lines.append(f"  ZeRO saves little: {saved}, with stage {pays['least_state']}")
    else:
        lines.append(f"  ZeRO pays: stage {pays['least_state']} saves {saved}")
    if gpu_gib is not None:
        smallest = pays["smallest_that_fits"]
        advice = f"set {memory_savers(config.engine)}"
        lines.append(f"  the smallest stage that fits {gpu_gib:g} GiB: {smallest}" if smallest is not None
                     else f"  no stage fits {gpu_gib:g} GiB: {advice}")  # fmt: skip
    return "\n".join(lines)


def assignment_text(assignment: dict[str, Any] | None) -> str:
    if assignment is None:
        return "Assignment of images: not checked, as their number is not known"
    head = "Assignment of images, one epoch of {images:,} over {ranks} ranks and {steps:,} steps".format(**assignment)
    source = "order of the shards" if assignment["from_shards"] else "full shuffle; the shards are not here"
    if assignment["faults"]:
        return "\n  ".join([head, *(f"FAULT: {fault}" for fault in assignment["faults"][:5])])
    return (f"{head}\n  each of {assignment['once']:,} images goes to one rank once, {assignment['left_out']} are left "
            f"out, {assignment['masked']} slots masked,\n  and all ranks have as many micro-batches in every step "
            f"({source})")  # fmt: skip


def columns(rows: list[list[str]]) -> list[str]:
    """Lines of aligned cells: words to the left, numbers to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    numbers = [rows[1][i][:1].isdigit() for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [cell.rjust(width) if number else cell.ljust(width)
                 for cell, width, number in zip(row, widths, numbers, strict=True)]  # fmt: skip
        lines.append(("  " + "  ".join(cells)).rstrip())
    return lines
