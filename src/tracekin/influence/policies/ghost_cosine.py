"""``ghost`` between gradients of unit length over all layers together. Control: ``tracin_cosine``."""

from tracekin.influence.policies import tracin
from tracekin.influence.policies.policy import Policy

POLICY = Policy(tracin.score, gradients="layers", normalise=True)
