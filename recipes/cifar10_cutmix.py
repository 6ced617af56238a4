"""The network this package ships, on CIFAR-10; second of five parts: on from the first's weights, with cutmix.

    efficientformer train recipes/cifar10_cutmix.py -m runs/cifar10/last.safetensors --data cifar10 -o runs/cutmix

What comes before and after it is in cifar10.py.
"""

model = "efficientformer_cifar10"
pretrained = True
epochs = 26
batch_size = 256
opt = "muon"
opt_args = {"fallback_lr_scale": 0.2}
lr = 0.015
warmup_lr = 0.0
min_lr = 0.0
warmup_epochs = 1
weight_decay = 0.05
layer_decay = 1.0
label_smoothing = 0.1
crop = "pad"
padding = 4
cutout = 8
cutmix = 1.0
mix_prob = 0.6
refine_epochs = 3
ema_decay = 0.998
ema_epochs = 5
eval_every = 2
