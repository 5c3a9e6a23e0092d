"""TracIn over several layers of the heads by the ghost product (a^T a')(delta^T delta'), ``mining.layers`` of them.

Only the predictor's last layer is exact. Before a batch norm the gradient at a layer's output is that of the whole
batch's loss at this image's place, not that of the image's own loss, because batch norm couples the samples: there the
product is an approximation, and says so. Control: ``tracin``, the last layer alone.
"""

from tracekin.influence.policies import tracin
from tracekin.influence.policies.policy import Policy

POLICY = Policy(tracin.score, gradients="layers")
