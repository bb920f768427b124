"""`expertwire.strategies`: strategies of test-time compute; see docs/test_time_compute.md."""

if not __name__.startswith("expertwire."):
    raise ImportError("import this package as `expertwire.strategies`, not as `strategies`")

from expertwire.strategies.adaptive_consistency import AdaptiveConsistency
from expertwire.strategies.answers import AnswerExtractor, BoxedAnswer, JsonPointerAnswer, RegexAnswer, WholeText
from expertwire.strategies.auto import Auto
from expertwire.strategies.base import Branch, Budget, Group, Needs, Selection, Status, Strategy
from expertwire.strategies.beam import BeamSearch
from expertwire.strategies.best_of_n import BestOfN
from expertwire.strategies.compute_optimal import Bin, ComputeOptimal
from expertwire.strategies.confidence_pruning import ConfidencePruning
from expertwire.strategies.confidence_vote import ConfidenceVote
from expertwire.strategies.dvts import DVTS
from expertwire.strategies.first_k_finish import FirstKFinish
from expertwire.strategies.lookahead import Lookahead
from expertwire.strategies.majority_vote import MajorityVote
from expertwire.strategies.sequential_revision import SequentialRevision
from expertwire.strategies.step_retries import StepRetries
from expertwire.strategies.verifier_vote import VerifierVote
from expertwire.strategies.verifiers import Candidate, Verifier, VerifierError, VerifierPolicy

__all__ = [
    "DVTS",
    "AdaptiveConsistency",
    "AnswerExtractor",
    "Auto",
    "BeamSearch",
    "BestOfN",
    "Bin",
    "BoxedAnswer",
    "Branch",
    "Budget",
    "Candidate",
    "ComputeOptimal",
    "ConfidencePruning",
    "ConfidenceVote",
    "FirstKFinish",
    "Group",
    "JsonPointerAnswer",
    "Lookahead",
    "MajorityVote",
    "Needs",
    "RegexAnswer",
    "Selection",
    "SequentialRevision",
    "Status",
    "StepRetries",
    "Strategy",
    "Verifier",
    "VerifierError",
    "VerifierPolicy",
    "VerifierVote",
    "WholeText",
]
