"""Batch norm as torch has it: with scale and shift, without, and with the statistics of the batch at test too."""

from __future__ import annotations

from torch import nn

from robustlayers.models.norms import NormKind
from robustlayers.normalization.layers.common import batch_norm_like, kind, plain

__all__ = ["BATCH", "BATCH_AT_TEST", "BATCH_NO_AFFINE", "batch_at_test", "batch_no_affine", "batch_norm"]


def batch_norm(norm: nn.Module) -> nn.Module:
    """Return batch norm in the place of `norm`: torch's own layer.

    **What.** Each channel is normalized over the images and pixels of the batch in training, by running statistics at
    test.

    **Maths.** y = weight (x - mu) / sqrt(var + eps) + bias per channel; var is biased in y, unbiased in the running one.

    **Cost.** 2 c parameters, 2 c + 1 numbers of state, for c channels.

    **Source.** Ioffe and Szegedy 2015 (arXiv 1502.03167).

    **Carried over.** Of batch norm the layer itself stays. Of a dual norm everything of the branch that is set; of an
    adapter the function, as one layer; of others scale and shift, while the statistics begin anew (mean 0, variance 1).

    **Not known.** Why it helps clean accuracy and, in some measurements, harms robustness: the reasons given disagree.
    """
    norm = plain(norm)
    if isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.affine and norm.running_mean is not None:
        return norm
    return batch_norm_like(norm)


def batch_no_affine(norm: nn.Module) -> nn.Module:
    """Return batch norm without scale and shift in the place of `norm`.

    **What.** The statistics alone: which part of batch norm is it? `BNwoA` of RobustNorm's comparison.

    **Maths.** y = (x - mu) / sqrt(var + eps).

    **Cost.** No parameters.

    **Source.** Awais, Shamshad and Bae 2020 (arXiv 2006.11007).

    **Carried over.** The running statistics. A conversion of a trained network changes its function: scale and shift are
    gone.

    **Not known.** How much of batch norm's effect under attack is the statistics' alone; published results are for few
    architectures.
    """
    return batch_norm_like(plain(norm), affine=False)


def batch_at_test(norm: nn.Module) -> nn.Module:
    """Return batch norm that normalizes by the batch at test too, in the place of `norm`.

    **What.** No running statistics at all (`BNwoT`): what an attack does to the statistics is in them at once.

    **Maths.** As batch norm in training mode, in every mode.

    **Cost.** 2 c parameters, no state. A prediction depends on the other images of the batch, a batch of one image with
    one pixel per channel is an error, and robust accuracy depends on what is attacked together: the flags of an evaluation
    say so.

    **Source.** Awais, Shamshad and Bae 2020 (arXiv 2006.11007).

    **Carried over.** Scale and shift. The running statistics are lost, so that converting back does not give the network
    back.

    **Not known.** How much of the robustness that is reported remains under attacks that know the whole batch.
    """
    return batch_norm_like(plain(norm), tracking=False)


BATCH = NormKind(nn.BatchNorm2d, replace=batch_norm)
# No shift of its own, but the mean is subtracted: a bias of the convolution before it would be, too.
BATCH_NO_AFFINE = kind(batch_no_affine)
BATCH_AT_TEST = kind(batch_at_test)
