"""EfficientFormer-L3 on ImageNet-1k, the recipe of its paper.

    torchrun --nproc-per-node 8 -m efficientformer train recipes/imagenet1k_l3.py --data IMAGENET --output runs/l3

Published top-1: 82.4 (V1 paper, section 5.1, and the authors' main.py, whose defaults these are). Not run by us: no
ImageNet and no eight GPUs were at hand. The authors' cooldown (10 more epochs at the last learning rate) is left out.
We measure averaged weights, the authors plain ones. The teacher is RegNetY-16GF (82.9), as in DeiT; give its weights
with --set teacher_weights=FILE where there is no net.
"""

model = "efficientformer_l3"
pretrained = False
epochs = 300
batch_size = 1024
opt = "adamw"
lr = 2e-3
weight_decay = 0.025
layer_decay = 1.0
schedule = "cosine"
warmup_epochs = 5
warmup_lr = 1e-6
min_lr = 1e-5
clip = "agc"
clip_value = 0.01
drop_path = 0.0
layer_scale_init = 1e-05
label_smoothing = 0.1
crop = "rrc"
crop_scale = (0.08, 1.0)
randaugment = "rand-m9-mstd0.5-inc1"
interpolation = "bicubic"
erasing = 0.25
mixup = 0.8
cutmix = 1.0
repeats = 3
ema_decay = 0.99996
teacher = "timm:regnety_160.deit_in1k"
distillation = "hard"
distill_alpha = 0.5
eval_every = 5
