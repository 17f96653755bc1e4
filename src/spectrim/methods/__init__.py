"""Compression methods: each a frozen dataclass that sees sites, linear algebra and factors only."""

from spectrim.methods.activation_svd import ActivationSVD
from spectrim.methods.base import Curve, LowRankMethod, Method, as_methods, from_record, on_offer
from spectrim.methods.cp import ActivationCP, WeightCP
from spectrim.methods.joint_svd import JointSVD
from spectrim.methods.low_rank_plus_sparse import LowRankPlusSparse
from spectrim.methods.principal_filters import PrincipalFilters
from spectrim.methods.tied_svd import TiedSVD
from spectrim.methods.tucker import ActivationTucker2, WeightTucker2
from spectrim.methods.weight_svd import WeightSVD

__all__ = [
    "ActivationCP",
    "ActivationSVD",
    "ActivationTucker2",
    "Curve",
    "JointSVD",
    "LowRankMethod",
    "LowRankPlusSparse",
    "Method",
    "PrincipalFilters",
    "TiedSVD",
    "WeightCP",
    "WeightSVD",
    "WeightTucker2",
    "as_methods",
    "from_record",
    "on_offer",
]
