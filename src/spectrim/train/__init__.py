"""Training: a loop with exact resume, distillation, decay of products of factors, learned ranks, moving supports."""

from spectrim.train.carrying import Carried, carry_optimizer
from spectrim.train.distillation import Distillation
from spectrim.train.learn import LearnedResult, budget_path, learn_ranks
from spectrim.train.learned_ranks import LearnedRanks
from spectrim.train.loop import Loop
from spectrim.train.penalties import FactoredPair, add_product_decay, factored_pairs, product_penalty
from spectrim.train.recipe import Recipe
from spectrim.train.regrow import Regrow
from spectrim.train.result import EpochRecord, TrainingResult
from spectrim.train.schedule import PAPER_SCHEDULES, Schedule
from spectrim.train.sweeping import Sweeping, sweep
from spectrim.train.tune import fine_tune

__all__ = [
    "PAPER_SCHEDULES",
    "Carried",
    "Distillation",
    "EpochRecord",
    "FactoredPair",
    "LearnedRanks",
    "LearnedResult",
    "Loop",
    "Recipe",
    "Regrow",
    "Schedule",
    "Sweeping",
    "TrainingResult",
    "add_product_decay",
    "budget_path",
    "carry_optimizer",
    "factored_pairs",
    "fine_tune",
    "learn_ranks",
    "product_penalty",
    "sweep",
]
