"""TracIn between gradients of unit length: large norms have no advantage. Control: ``tracin``."""

from tracekin.influence.policies import tracin
from tracekin.influence.policies.policy import Policy

POLICY = Policy(tracin.score, gradients="last", normalise=True)
