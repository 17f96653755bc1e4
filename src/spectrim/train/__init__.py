"""Training after a compression: one short loop, distillation, decay of the product of factors, exact resume."""

from spectrim.train.distillation import Distillation
from spectrim.train.loop import Loop
from spectrim.train.penalties import FactoredPair, add_product_decay, factored_pairs, product_penalty
from spectrim.train.recipe import Recipe
from spectrim.train.result import EpochRecord, TrainingResult
from spectrim.train.tune import fine_tune

__all__ = [
    "Distillation",
    "EpochRecord",
    "FactoredPair",
    "Loop",
    "Recipe",
    "TrainingResult",
    "add_product_decay",
    "factored_pairs",
    "fine_tune",
    "product_penalty",
]
