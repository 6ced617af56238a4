"""V1 against mmpretrain and transformers: outputs of their code, kept in a file that ``make parity`` makes anew."""

import numpy as np
import pytest
import torch

from efficientformer.models.network import EfficientFormer
from efficientformer.spec.variants import VARIANTS
from tests.parity.make_golden import GOLDEN, NAMES, SEEDS, images
from tests.parity.outputs import outputs
from tests.parity.regimes import REGIMES, random_state

# Correct ports are 1e-6 and 1e-14 apart; every known mistake costs more (see the parity page of the docs).
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}
KEPT_AS = {"pooled": "pooled", "head": "cls", "head_dist": "dist", "logits": "logits"}  # our names, the file's


@pytest.fixture(scope="module")
def golden():
    return np.load(GOLDEN)


# three seeds of L1; of the large networks, which take their time, the first
CASES = [(name, seed) for name in NAMES for seed in (SEEDS if name == "efficientformer_l1" else SEEDS[:1])]


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize(("name", "seed"), CASES)
def test_outputs_equal_both_peers(golden, name, regime, seed):
    model = EfficientFormer(VARIANTS[name])
    model.load_state_dict(random_state(VARIANTS[name], seed, regime))
    for dtype, limit in TOLERANCE.items():
        model, x = model.to(dtype), images(seed, dtype)
        with torch.inference_mode():
            ours = outputs(model, x)
        for peer in ("mmpretrain", "transformers"):
            for key, kept in KEPT_AS.items():
                theirs = golden[f"{peer}/{name}/{regime}/{seed}/{kept}"]
                assert theirs.dtype == np.float64
                assert np.abs(ours[key][0].numpy() - theirs).max() <= limit, (peer, key, dtype)
