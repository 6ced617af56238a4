"""Run mmpretrain's and transformers' networks on the parity weights and keep their outputs: ``make parity``.

The two need libraries of their own that do not live beside ours, so the tests compare with this file. It holds what
they compute in double precision, which both of our precisions are held against. Weights and images are made from
seeds by ``regimes.py``, and reach the peers through our own writers of their layouts.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from efficientformer.spec.variants import VARIANTS  # noqa: E402
from efficientformer.weights.formats.translate import from_ours  # noqa: E402
from tests.parity.regimes import REGIMES, random_state  # noqa: E402

GOLDEN = ROOT / "tests" / "fixtures" / "golden_peers.npz"
SEEDS = (0, 1, 2)
NAMES = ("efficientformer_l1", "efficientformer_l3", "efficientformer_l7")


def images(seed: int, dtype: torch.dtype) -> torch.Tensor:
    """Return one seeded image (1, 3, 224, 224)."""
    return torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(1000 + seed), dtype=torch.float32).to(
        dtype
    )


def run_mmpretrain(name: str, state: dict[str, torch.Tensor], x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return pooled features, each head's logits and their mean."""
    from mmpretrain.models import EfficientFormer, EfficientFormerClsHead

    spec = VARIANTS[name]
    backbone = EfficientFormer(arch=name[-2:], drop_path_rate=0).to(x.dtype)
    head = EfficientFormerClsHead(in_channels=spec.stages[-1].width, num_classes=1000).to(x.dtype)
    theirs = from_ours(state, "mmpretrain", spec)
    # eval() before loading leaves their cached attention biases stale, so: load, then eval
    backbone.load_state_dict({k.removeprefix("backbone."): v for k, v in theirs.items() if k.startswith("backbone.")})
    head.load_state_dict({k.removeprefix("head."): v for k, v in theirs.items() if k.startswith("head.")})
    backbone.eval()
    head.eval()
    pooled = backbone(x)[-1].mean(-1)  # (B, C, N) -> (B, C)
    return {"pooled": pooled, "cls": head.head(pooled), "dist": head.dist_head(pooled), "logits": head((pooled,))}


def run_transformers(name: str, state: dict[str, torch.Tensor], x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return pooled features, each head's logits and their mean, with LayerNorm's eps as in training (1e-5)."""
    from transformers import EfficientFormerConfig, EfficientFormerForImageClassificationWithTeacher

    spec = VARIANTS[name]
    config = EfficientFormerConfig(
        depths=[len(stage.blocks) for stage in spec.stages],
        hidden_sizes=[stage.width for stage in spec.stages],
        dim=spec.stages[-1].width,
        num_meta3d_blocks=sum(block.kind == "mb3d" for block in spec.stages[-1].blocks),
        layer_norm_eps=1e-5,
        num_labels=1000,
    )
    config.hidden_size = spec.stages[-1].width
    model = EfficientFormerForImageClassificationWithTeacher(config).to(x.dtype)
    model.load_state_dict(from_ours(state, "transformers", spec))
    model.eval()
    out = model(x)
    pooled = model.efficientformer(x)[0].mean(-2)
    return {"pooled": pooled, "cls": out.cls_logits, "dist": out.distillation_logits, "logits": out.logits}


def main() -> None:
    """Write the golden file and print what was run."""
    import mmpretrain
    import transformers

    torch.set_num_threads(2)
    golden = {}
    for name in NAMES:
        for regime in REGIMES:
            for seed in SEEDS:
                state = random_state(VARIANTS[name], seed, regime, torch.float64)
                for peer, run in (("mmpretrain", run_mmpretrain), ("transformers", run_transformers)):
                    with torch.inference_mode():
                        outputs = run(name, state, images(seed, torch.float64))
                    for key, value in outputs.items():
                        golden[f"{peer}/{name}/{regime}/{seed}/{key}"] = value[0].numpy()
                    print(peer, name, regime, seed, "logits std", float(outputs["logits"].std()), flush=True)
    golden["versions"] = np.array(f"mmpretrain {mmpretrain.__version__}, transformers {transformers.__version__}")
    np.savez_compressed(GOLDEN, **golden)
    print("wrote", GOLDEN.relative_to(ROOT), GOLDEN.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
