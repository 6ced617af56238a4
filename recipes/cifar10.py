"""The network this package ships, on CIFAR-10; first of five parts.

    efficientformer train recipes/cifar10.py --data cifar10 -o runs/cifar10
    efficientformer train recipes/cifar10_cutmix.py -m runs/cifar10/last.safetensors --data cifar10 -o runs/cutmix
    ...                                                                # three more parts: cifar10_cutmix.py says which
    python tools/embed.py runs/final --data originals
    efficientformer test efficientformer_cifar10 --data cifar10        # the network in the package, as users run it

``cifar10`` holds ``train/CLASS/*`` and ``test/CLASS/*`` as JPEG, ``originals`` the same pictures without loss and
``both`` both (cifar10_cutmix.py says where from). The weights taken are the last ones, averaged over the last
epochs; no epoch is chosen by its test figure. What it reached is in docs/embedded.md.
"""

model = "efficientformer_cifar10"
pretrained = False
epochs = 22
batch_size = 256
opt = "muon"
opt_args = {"fallback_lr_scale": 0.2}
lr = 0.02
warmup_lr = 0.0
min_lr = 0.0
warmup_epochs = 2
weight_decay = 0.05
layer_decay = 1.0
layer_scale_init = 0.1
label_smoothing = 0.1
crop = "pad"
padding = 4
cutout = 8
refine_epochs = 3
ema_decay = 0.998
ema_epochs = 5
eval_every = 2
