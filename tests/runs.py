"""The configuration of a run that trains in seconds."""

TINY = """
model:
  queries: proposals
  refine_boxes: true
  width: 32
  num_heads: 2
  encoder_layers: 1
  decoder_layers: 2
  ffn_width: 32
  num_queries: 12
  backbone: {name: resnet18, norm: group, width: 16}
data: {workers: 1, sizes: [64], max_size: 100, crop_resize: [48], crop_sizes: [32, 48]}
train: {global_batch: 8, micro_batch: 2, epochs: 2, lr_drop_epochs: [1], checkpoint_every: 2}
engine: {precision: fp32}
tracking: {log_every: 1, pictures: 2}
eval: {batch: 3}
"""
