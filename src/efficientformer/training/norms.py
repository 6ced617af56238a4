"""What BatchNorm does in training: statistics of this process's batch, of all processes' batches, or frozen."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce


class AnyDeviceSyncNorm(nn.BatchNorm2d):
    """BatchNorm over the batches of all processes, on any backend (torch's own needs a GPU).

    Forward differs from one process with the whole batch by rounding only.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (B, C, h, w) with the mean and variance over every process's B, h and w."""
        if not self.training or not dist.is_initialized() or dist.get_world_size() == 1:
            return super().forward(x)
        wide = x.float()
        count = torch.full((1,), float(x.numel() // x.shape[1]), device=x.device)
        sums = torch.cat([wide.sum((0, 2, 3)), count])  # (C + 1,)
        total: Tensor = all_reduce(sums)
        mean = total[:-1] / total[-1]  # (C,)
        centred = wide - mean[:, None, None]
        squares: Tensor = all_reduce(centred.square().sum((0, 2, 3)))
        variance = squares / total[-1]  # (C,)
        self._track(mean.detach(), variance.detach(), float(total[-1].detach()))
        scale = self.weight * (variance + self.eps).rsqrt()
        result = centred * scale[:, None, None] + self.bias[:, None, None]
        return result.to(x.dtype)

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor, count: float) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        self.num_batches_tracked += 1
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(variance * count / max(1.0, count - 1), self.momentum)  # unbiased, as torch keeps it


def synchronise_norms(model: nn.Module, device: torch.device) -> None:
    """Make every BatchNorm inside a network count over all processes; names and values stay."""
    if device.type == "cuda":
        nn.SyncBatchNorm.convert_sync_batchnorm(model)  # replaces the children in place
        return
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = AnyDeviceSyncNorm
