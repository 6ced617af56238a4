"""What other libraries call things, and what to use here instead: errors lead there; nothing is renamed."""

from __future__ import annotations

from collections.abc import Mapping

_CLASSIFY = "Classifier(MODEL)(picture), or Classifier(MODEL).predict(pictures)"
_NETWORK = "get_model(NAME, pretrained=True)"
_TRANSFORM = "transform(NAME or network)"
_CONVERT = "efficientformer convert MODEL FILE.onnx"
_EXPORT = f"efficientformer.export.onnx.export_onnx, or the command: {_CONVERT}"

NAMES = {
    "create_model": _NETWORK,
    "model_entrypoint": _NETWORK,
    "init_model": _NETWORK,
    "build_classifier": _NETWORK,
    "AutoModel": _NETWORK,
    "AutoModelForImageClassification": _NETWORK,
    "EfficientFormerForImageClassification": _NETWORK,
    "EfficientFormerForImageClassificationWithTeacher": _NETWORK,
    "from_pretrained": _NETWORK,
    "load_model": _NETWORK,
    "is_model": "list_models(NAME), which is empty for a name of no network",
    "list_pretrained": "list_models()",
    "resolve_data_config": _TRANSFORM,
    "resolve_model_data_config": _TRANSFORM,
    "create_transform": _TRANSFORM,
    "AutoImageProcessor": _TRANSFORM,
    "EfficientFormerImageProcessor": _TRANSFORM,
    "pipeline": _CLASSIFY,
    "YOLO": _CLASSIFY,
    "ImageClassificationInferencer": _CLASSIFY,
    "InferenceSession": _CLASSIFY,
    "predict": _CLASSIFY,
    "inference": "inference_model(MODEL, picture)",
    "FeatureExtractor": "get_model(NAME, pretrained=True).features(images)",
    "load_checkpoint": "get_model(FILE), or efficientformer.weights.checkpoint.load_checkpoint(FILE)",
    "save_checkpoint": "save_model(network, FILE)",
    "save_pretrained": "save_model(network, FILE)",
    "validate": "evaluate_model(MODEL, DATA)",
    "val": "evaluate_model(MODEL, DATA)",
    "evaluate": "evaluate_model(MODEL, DATA)",
    "Trainer": "train(Recipe(model=NAME), DATA)",
    "TrainingArguments": "Recipe",
    "finetune": "train(Recipe(model=NAME), DATA)",
    "benchmark": "efficientformer.benchmarking.benchmark.benchmark, or the command: efficientformer benchmark MODEL",
    "export_onnx": _EXPORT,
    "convert": _EXPORT,
    "gather": "efficientformer.runtime.inputs.gather",
}
"""Names of a module, by what they are called elsewhere."""

COMMANDS = {
    "export": _CONVERT,
    "val": "efficientformer test MODEL --data DIR",
    "eval": "efficientformer test MODEL --data DIR",
    "evaluate": "efficientformer test MODEL --data DIR",
    "validate": "efficientformer test MODEL --data DIR",
    "tune": "efficientformer train --model MODEL --data DIR",
    "finetune": "efficientformer train --model MODEL --data DIR",
    "fine-tune": "efficientformer train --model MODEL --data DIR",
    "fit": "efficientformer train --model MODEL --data DIR",
    "resume": "efficientformer train --resume FOLDER",
    "distill": "efficientformer train --data DIR --set teacher=MODEL",
    "prune": "efficientformer slim --data DIR --target-latency 2ms -o FOLDER",
    "classify": "efficientformer predict INPUT... --model MODEL",
    "infer": "efficientformer predict INPUT... --model MODEL",
    "inference": "efficientformer predict INPUT... --model MODEL",
    "detect": "efficientformer predict INPUT... --model MODEL, for whole pictures: nothing here finds objects in them",
    "serve": 'a few lines of Python: docs/coming_from.md, "Over HTTP"',
    "models": "efficientformer list",
    "checks": "efficientformer list",
    "speed": "efficientformer benchmark MODEL",
    "bench": "efficientformer benchmark MODEL",
    "fetch": "efficientformer download MODEL",
}
"""Commands, by what they are called elsewhere."""

SETTINGS = {
    "learning_rate": "lr",
    "lr0": "lr",
    "base_lr": "lr",
    "lrf": "min_lr, a learning rate",
    "optimizer": "opt",
    "optim": "opt",
    "wd": "weight_decay",
    "weight-decay": "weight_decay",
    "lr_scheduler": "schedule",
    "lr_scheduler_type": "schedule",
    "sched": "schedule",
    "warmup_ratio": "warmup_epochs",
    "warmup_lr_init": "warmup_lr",
    "warmup_steps": "warmup_epochs",
    "num_train_epochs": "epochs",
    "max_epochs": "epochs",
    "batch": "batch_size",
    "bs": "batch_size",
    "per_device_train_batch_size": "batch_size, over all devices together",
    "gradient_accumulation_steps": "accumulate: parts that a step's batch_size is cut into",
    "grad_accum_steps": "accumulate: parts that a step's batch_size is cut into",
    "clip_grad": "clip_value, with clip for the kind",
    "clip_mode": "clip",
    "max_grad_norm": "clip_value, with clip=norm",
    "imgsz": "input_size",
    "img_size": "input_size",
    "image_size": "input_size",
    "num_workers": "workers",
    "dataloader_num_workers": "workers",
    "patience": "early_stopping: evaluations without a better top-1",
    "smoothing": "label_smoothing",
    "label_smoothing_factor": "label_smoothing",
    "drop": "head_dropout",
    "dropout": "head_dropout",
    "drop_rate": "head_dropout",
    "drop_path_rate": "drop_path",
    "aa": "randaugment",
    "auto_augment": "randaugment",
    "reprob": "erasing",
    "random_erasing": "erasing",
    "fliplr": "hflip",
    "flipud": "vflip",
    "mixup_alpha": "mixup",
    "cutmix_alpha": "cutmix",
    "amp": "precision",
    "fp16": "precision=fp16",
    "bf16": "precision=bf16",
    "model_ema_decay": "ema_decay",
    "distillation_type": "distillation",
    "distillation_alpha": "distill_alpha",
    "teacher_model": "teacher",
    "gradient_checkpointing": "grad_checkpointing",
    "gradient_checkpoint": "grad_checkpointing",
    "torchcompile": "compile",
    "sync_bn": "norm=sync",
    "num_classes": "left out: the data set says how many classes there are",
    "nc": "left out: the data set says how many classes there are",
    "data": "--data DIR, or train(recipe, DIR)",
    "output": "--output FOLDER, or train(recipe, DIR, FOLDER)",
    "output_dir": "--output FOLDER, or train(recipe, DIR, FOLDER)",
    "device": "--device, or train(..., device=)",
    "checkpoint": "model, which may be a weights file",
    "weights": "model, which may be a weights file",
}
"""Fields of a recipe, by what they are called elsewhere."""

ENGINE_WORDS = {
    "ort": "onnxruntime",
    "onnx": "onnxruntime",
    "onnx-runtime": "onnxruntime",
    "ov": "openvino",
    "pytorch": "torch",
    "tensorrt": "torch on a GPU; TensorRT builds its engines from the .onnx files that convert writes",
}
"""Engines, by what they are called elsewhere."""


def pointer(words: Mapping[str, str], word: str) -> str:
    """Return the sentence that leads from another library's word to ours; empty for a word of none.

    Args:
        words: One of the tables here.
        word: What was asked for.
    """
    return f"Here: {words[word]}" if word in words else ""
