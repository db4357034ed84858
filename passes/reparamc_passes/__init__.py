"""The rewrites of reparamc, one file each. This tuple is the only list of them.

Order decides which of two applicable rewrites is tried first, and so what a report counts. What becomes
of a graph depends on it in one place: branches of zeros are dropped before anything is merged into them.
"""

from __future__ import annotations

from reparamc.algebra.rewrite import Pass
from reparamc_passes.bn_folding import BN_FOLDING
from reparamc_passes.branch_merging import BRANCH_MERGING
from reparamc_passes.channel_moving import CHANNEL_MOVING
from reparamc_passes.constant_folding import CONSTANT_FOLDING
from reparamc_passes.duplicate_removal import DUPLICATE_REMOVAL
from reparamc_passes.identity_to_conv import IDENTITY_TO_CONV
from reparamc_passes.impulse_response import IMPULSE_RESPONSE
from reparamc_passes.layout_cancelling import LAYOUT_CANCELLING
from reparamc_passes.like_terms import LIKE_TERMS
from reparamc_passes.lossless_shrink import LOSSLESS_SHRINK
from reparamc_passes.norm_folding import NORM_FOLDING
from reparamc_passes.piece_folding import PIECE_FOLDING
from reparamc_passes.placing import PLACING
from reparamc_passes.redundant_activation import REDUNDANT_ACTIVATION
from reparamc_passes.repmixer import REPMIXER
from reparamc_passes.scale_folding import SCALE_FOLDING
from reparamc_passes.sequence_merging import SEQUENCE_MERGING
from reparamc_passes.space_to_depth import SPACE_TO_DEPTH
from reparamc_passes.upsampling import UPSAMPLING

PASSES: tuple[Pass, ...] = (
    REDUNDANT_ACTIVATION,
    LOSSLESS_SHRINK,
    CONSTANT_FOLDING,
    REPMIXER,
    BN_FOLDING,
    SCALE_FOLDING,
    NORM_FOLDING,
    LIKE_TERMS,
    IDENTITY_TO_CONV,
    BRANCH_MERGING,
    PLACING,
    SPACE_TO_DEPTH,
    UPSAMPLING,
    SEQUENCE_MERGING,
    CHANNEL_MOVING,
    LAYOUT_CANCELLING,
    IMPULSE_RESPONSE,
    PIECE_FOLDING,
    DUPLICATE_REMOVAL,
)

__all__ = ["PASSES"]
