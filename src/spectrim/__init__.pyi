"""What type checkers and editors see of the package; ``__init__.py`` loads the same names on first use."""

from spectrim.application import apply as apply
from spectrim.channel_plans.widths import KL as KL
from spectrim.channel_plans.widths import Energy as Energy
from spectrim.channel_plans.widths import recommend as recommend
from spectrim.cost.counted import macs as macs
from spectrim.cost.counted import parameters as parameters
from spectrim.cost.counted import size_bytes as size_bytes
from spectrim.cost.latency import Latency as Latency
from spectrim.errors import CalibrationError as CalibrationError
from spectrim.errors import CheckpointError as CheckpointError
from spectrim.errors import ExportError as ExportError
from spectrim.errors import InfeasibleBudgetError as InfeasibleBudgetError
from spectrim.errors import MissingMomentsError as MissingMomentsError
from spectrim.errors import PlanError as PlanError
from spectrim.errors import ProofError as ProofError
from spectrim.errors import SpectrimError as SpectrimError
from spectrim.errors import UnsupportedLayerError as UnsupportedLayerError
from spectrim.methods import ActivationSVD as ActivationSVD
from spectrim.methods import JointSVD as JointSVD
from spectrim.methods import LowRankPlusSparse as LowRankPlusSparse
from spectrim.methods import Method as Method
from spectrim.methods import PrincipalFilters as PrincipalFilters
from spectrim.methods import WeightSVD as WeightSVD
from spectrim.network.choices import Choice as Choice
from spectrim.network.factors import LowRank as LowRank
from spectrim.network.factors import SharedBasis as SharedBasis
from spectrim.network.groups import group as group
from spectrim.network.sites import Site as Site
from spectrim.network.sites import Sites as Sites
from spectrim.nn.channels.graph import couple as couple
from spectrim.nn.checkpoint import load as load
from spectrim.nn.checkpoint import save as save
from spectrim.nn.export import export_onnx as export_onnx
from spectrim.nn.export import export_program as export_program
from spectrim.nn.find import find as find
from spectrim.nn.sparse.kernels import choose_kernels as choose_kernels
from spectrim.nn.surgery import merge as merge
from spectrim.nn.watch.calibrate import calibrate as calibrate
from spectrim.nn.watch.sensitivity import sensitivity as sensitivity
from spectrim.pipeline import Result as Result
from spectrim.pipeline import compress as compress
from spectrim.report import compare as compare
from spectrim.report import write_report as write_report
from spectrim.selection.budget import Budget as Budget
from spectrim.selection.candidates import Candidates as Candidates
from spectrim.selection.plan import Plan as Plan
from spectrim.selection.selectors import select as select
from spectrim.selection.trajectory import Trajectory as Trajectory
from spectrim.tables import tabulate as tabulate
from spectrim.train import LearnedRanks as LearnedRanks
from spectrim.train import budget_path as budget_path
from spectrim.train import fine_tune as fine_tune
from spectrim.train import learn_ranks as learn_ranks

__version__: str
__all__: list[str]
