"""TracInCP (Pruthi et al., arXiv 2002.08484, section 3.3): TracIn summed over checkpoints, weighted by learning rate.

The sum runs over the current weights and the run's last ``mining.checkpoints`` checkpoints; each costs a forward pass
of both networks on the batch. Control: ``tracin``, the current weights alone.
"""

from tracekin.influence.policies import tracin
from tracekin.influence.policies.policy import Policy

POLICY = Policy(tracin.score, gradients="checkpoints")
