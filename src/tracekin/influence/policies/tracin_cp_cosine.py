"""``tracin_cp`` between gradients of unit length over all checkpoints together. Control: ``tracin_cosine``."""

from tracekin.influence.policies import tracin
from tracekin.influence.policies.policy import Policy

POLICY = Policy(tracin.score, gradients="checkpoints", normalise=True)
